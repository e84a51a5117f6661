"""Fine-tuning: layer groups, phases, distillation, ensembles, the one Trainer subclass."""

from moss_rlhf.finetuning.ensemble import ensemble
from moss_rlhf.finetuning.finetune import Training, finetune
from moss_rlhf.finetuning.layers import layer_learning_rates

__all__ = ["Training", "ensemble", "finetune", "layer_learning_rates"]
