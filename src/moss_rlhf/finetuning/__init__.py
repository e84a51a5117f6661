"""Fine-tuning: layer groups, phases, distillation, the one Trainer subclass."""

from moss_rlhf.finetuning.finetune import Training, finetune
from moss_rlhf.finetuning.layers import layer_learning_rates
from moss_rlhf.finetuning.pretraining import pretrain

__all__ = ["Training", "finetune", "layer_learning_rates", "pretrain"]
