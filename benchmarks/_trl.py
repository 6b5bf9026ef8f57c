"""Settings of TRL's trainers in every benchmark: bayeslm's distribution and rules, and nothing but training."""

from __future__ import annotations

from typing import Any

RULES: dict[str, Any] = {
    # completions come from the current policy
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    # Adam's fused kernel is the fastest; a rate that falls to 0
    "optim": "adamw_torch_fused",
    "weight_decay": 0.0,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
    "disable_dropout": True,
    # TRL's defaults, which cost time on a CPU
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
}
