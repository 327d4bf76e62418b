"""Spellings of options that other tools use: those veneer accepts, and those it answers with advice."""

from __future__ import annotations

_SPELLINGS: dict[str, tuple[str, ...]] = {
    "base_model": (
        "model",
        "model_name_or_path",
        "model_name",
        "base_model_name_or_path",
        "pretrained_model_name_or_path",
    ),
    "dtype": ("torch_dtype", "precision"),
    "load_in_4bit": ("load_4bit", "load_4_bit"),
    "load_in_8bit": ("load_8bit", "load_8_bit"),
    "load_in_fp8": ("load_fp8", "fp8"),
    "bnb_4bit_quant_type": ("quant_type",),
    "bnb_4bit_use_double_quant": ("double_quant", "use_double_quant", "double_quantization"),
    "llm_int8_outliers": ("int8_outliers",),
    "output_dir": ("output",),
    "output": ("output_dir",),
    "r": ("lora_r", "lora_rank", "rank"),
    "lora_alpha": ("alpha",),
    "lora_dropout": ("dropout",),
    "use_rslora": ("rslora",),
    "scale": ("lora_scale",),
    "init_lora_weights": ("init_lora", "lora_init"),
    "target_modules": ("lora_target_modules", "lora_target", "lora_targets"),
    "exclude_modules": ("lora_exclude_modules",),
    "dataset": ("data", "data_path", "train_file", "train_data", "train_dataset"),
    "eval_dataset": ("eval_file", "validation_file", "validation_dataset", "eval_data"),
    "validation_split": ("val_set_size", "val_size", "test_size", "eval_split"),
    "max_length": ("sequence_len", "cutoff_len", "max_seq_length", "max_seq_len"),
    "system_prompt": ("system", "default_system"),
    "learning_rate": ("lr",),
    "num_train_epochs": ("epochs", "num_epochs"),
    "max_steps": ("steps", "iters"),
    "per_device_train_batch_size": ("batch_size", "micro_batch_size", "train_batch_size", "per_device_batch_size"),
    "gradient_accumulation_steps": ("grad_accumulation_steps", "gradient_accumulation", "accumulation_steps"),
    "lr_scheduler_type": ("lr_scheduler", "scheduler"),
    "optim": ("optimizer",),
    "max_grad_norm": ("grad_clip", "gradient_clipping", "clip_grad_norm"),
    "seed": ("random_seed",),
    "save_total_limit": ("max_checkpoints",),
    "early_stopping_patience": ("patience",),
    "gradient_checkpointing": ("grad_checkpoint", "use_gradient_checkpointing", "activation_checkpointing"),
    "optimizer_in_bwd": ("optimizer_in_backward",),
    "torch_compile": ("compile",),
    "fsdp": ("use_fsdp",),
    "run_name": ("wandb_name", "wandb_run_name", "run"),
    "project_name": ("project", "wandb_project"),
    "adapter": ("adapters", "adapter_path", "adapter_name_or_path", "lora_path"),
    "adapters": ("adapter", "adapter_path", "adapter_name_or_path", "lora_path"),
    "max_new_tokens": ("max_tokens", "max_completion_tokens"),
    "batch_size": ("eval_batch_size", "per_device_eval_batch_size"),
    "num_return_sequences": ("num_return", "num_samples"),
    "limit": ("max_rows", "max_samples"),
    "n": ("rows", "num_rows"),
}
"""Option -> its other spellings. One spelling may serve two options that no verb has together."""

ALIASES: dict[str, tuple[str, ...]] = {}
"""Other spelling -> the options that it may stand for."""
for _option, _others in _SPELLINGS.items():
    for _other in _others:
        ALIASES[_other] = (*ALIASES.get(_other, ()), _option)

SHORTHANDS: dict[str, tuple[str, str]] = {"bf16": ("dtype", "bfloat16"), "fp16": ("dtype", "float16")}
"""Switches of other tools -> the option and its value that they stand for; off, they say nothing."""

ADVICE: dict[str, str] = {
    "packing": "sequences are always packed; leave it out",
    "sample_packing": "sequences are always packed; leave it out",
    "padding_free": "nothing is ever padded; leave it out",
    "quantization": "write `load_in_4bit`, `load_in_8bit` or `load_in_fp8`",
    "quantization_bit": "write `load_in_4bit` or `load_in_8bit`",
    "quantization_config": "write its options at the top level: `load_in_4bit`, `bnb_4bit_use_double_quant`",
    "bnb_4bit_compute_dtype": "products are in `dtype`",
    "bnb_4bit_quant_storage": "packed weights are bytes on every device, FSDP too; leave it out",
    "llm_int8_threshold": "inputs are not split; `llm_int8_outliers` keeps columns of far-out weights as they are",
    "llm_int8_skip_modules": "the vocabulary head alone is not quantised; leave it out",
    "use_dora": "the only method is lora; see `method`",
    "bias": "biases are not trained; leave it out",
    "lora_bias": "biases are not trained; leave it out",
    "task_type": "adapters are for causal language models; leave it out",
    "completion_only_loss": "the loss is on completions and assistant turns only; leave it out",
    "assistant_only_loss": "the loss is on completions and assistant turns only; leave it out",
    "train_on_inputs": "the loss is on completions and assistant turns only; leave it out",
    "datasets": "one file is read: `dataset` FILE.jsonl",
    "resume_from_checkpoint": "give --resume on the command line; `output_dir` says from where",
    "push_to_hub": "nothing is uploaded; `output_dir` is a folder that PEFT loads",
}
"""Options of other tools that have no counterpart here -> what to do instead; options of ours in backticks."""
