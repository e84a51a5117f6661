"""Fine-tuning: layer groups, phases, distillation, ensembles, the one Trainer subclass."""

from moss_rlhf.finetuning.ensemble import ensemble
from moss_rlhf.finetuning.finetune import finetune
from moss_rlhf.finetuning.from_scratch import from_scratch
from moss_rlhf.finetuning.layers import layer_learning_rates
from moss_rlhf.finetuning.pretraining import pretrain
from moss_rlhf.finetuning.running import Training

__all__ = ["Training", "ensemble", "finetune", "from_scratch", "layer_learning_rates", "pretrain"]
