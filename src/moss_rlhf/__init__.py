"""moss-rlhf."""
