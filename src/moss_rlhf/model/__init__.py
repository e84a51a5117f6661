"""What a transformer is to us: where it is, its anatomy, surgery, cost, checkpoints, runtimes."""
