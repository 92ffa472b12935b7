"""MuonClip and what goes with it: QK-Clip, the router's bias update, schedules, gradient clipping; sharded or not."""

from moonbase.optim.gradients import clip_gradients_, grad_norm
from moonbase.optim.groups import parameter_groups
from moonbase.optim.muonclip import MuonClip
from moonbase.optim.qk_clip import AttentionWeights, attention_weights, qk_clip_, reduce_max_logits
from moonbase.optim.router_bias import reduce_load, update_router_bias_
from moonbase.optim.schedule import learning_rate

__all__ = [
    "AttentionWeights",
    "MuonClip",
    "attention_weights",
    "clip_gradients_",
    "grad_norm",
    "learning_rate",
    "parameter_groups",
    "qk_clip_",
    "reduce_load",
    "reduce_max_logits",
    "update_router_bias_",
]
