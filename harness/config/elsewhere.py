"""Settings by the names that other trainers have for them (transformers, TRL, axolotl, LLaMA-Factory, torchtune), and what they are here."""

from __future__ import annotations

FULL = "all weights are trained: there is no LoRA, no adapter and no quantisation"
SUPERVISED = "training is supervised: there is no DPO, no reward model and no reinforcement learning"

_SETTINGS = {
    "`run_dir`": "output_dir logging_dir save_dir",
    "`model.path`": "model_name_or_path model_name model_id base_model pretrained_model_name_or_path",
    "`model.trust_code`": "trust_remote_code",
    "`model.attention`": "attn_implementation flash_attn flash_attention use_flash_attention_2 sdp_attention",
    "`data.tokenizer`": "tokenizer_name tokenizer_name_or_path tokenizer_path",
    "`data.train.path` or `data.train.hub`": "dataset datasets dataset_name dataset_path data_path data_files train_file train_data",
    "`data.validation`": "validation_file eval_dataset test_datasets val_dataset",
    "`data.validation_share`": "val_set_size val_size test_size validation_split",
    "`data.sequence_length`": "max_seq_length max_seq_len max_length model_max_length cutoff_len sequence_len seq_len seq_length block_size",
    "`data.packing`": "sample_packing pack_sequences packed",
    "`data.columns.text`": "dataset_text_field text_field text_column",
    "`data.shape`, which also says what is trained on": "train_on_inputs train_on_prompt completion_only_loss assistant_only_loss",
    "`data.num_processes`": "dataset_num_proc preprocessing_num_workers dataset_processes",
    "`train.epochs`": "num_train_epochs num_epochs n_epochs",
    "`train.steps`": "max_steps max_train_steps num_steps train_iters",
    "`train.micro_batch`": "per_device_train_batch_size micro_batch_size train_micro_batch_size_per_gpu",
    "`train.global_batch_rows`, or `train.micro_batch` for the rows of one forward pass": "batch_size train_batch_size global_batch_size",
    "the number that follows from `train.global_batch_rows`, `train.micro_batch` and the ranks": "gradient_accumulation_steps grad_accum_steps",
    "`train.precision`": "bf16 fp16 bfloat16 mixed_precision dtype torch_dtype",
    "`train.activation_checkpointing`": "gradient_checkpointing enable_activation_checkpointing",
    "`train.clip`": "max_grad_norm gradient_clipping grad_clip clip_grad_norm",
    "`optimizer.lr`": "learning_rate max_lr peak_lr",
    "`optimizer.schedule`": "lr_scheduler lr_scheduler_type scheduler lr_schedule lr_decay_style",
    "`optimizer.warmup_steps` or `optimizer.warmup_epochs`": "num_warmup_steps warmup_ratio warmup lr_warmup_iters",
    "`optimizer.betas`": "adam_beta1 adam_beta2 beta1 beta2",
    "`optimizer.eps`": "adam_epsilon adam_eps epsilon",
    "AdamW, by the section `optimizer`": "optim optimizer_type",
    "`engine.deepspeed`": "zero_stage deepspeed_config deepspeed_config_file zero_optimization",
    "`engine.pipeline_stages`": "pipeline_parallel_size pipeline_model_parallel_size pp_size",
    "`evaluation.every_steps`": "eval_steps eval_strategy evaluation_strategy evals_per_epoch eval_interval",
    "`evaluation.micro_batch`": "per_device_eval_batch_size eval_batch_size",
    "`evaluation.patience`": "early_stopping_patience early_stopping",
    "`checkpoint.every_steps`": "save_steps save_strategy saves_per_epoch save_interval save_every_n_steps",
    "`checkpoint.keep_last`": "save_total_limit",
    "`checkpoint.keep_best`": "load_best_model_at_end",
    "`launch.ranks`": "num_gpus n_gpus world_size nproc_per_node",
    "`launch.hosts.file`, `launch.slurm.nodes` or `launch.kubernetes.pods`": "num_nodes nnodes num_machines",
}
_SENTENCES = {
    FULL: "lora qlora dora peft peft_config use_peft adapter lora_r lora_alpha lora_dropout lora_target lora_target_modules lora_rank "
          "finetuning_type load_in_4bit load_in_8bit quantization quantization_bit bnb_4bit_compute_dtype",
    SUPERVISED: "dpo orpo kto grpo ppo rl rlhf reward_model pref_beta",
    "the same command again resumes from the newest checkpoint": "resume_from_checkpoint auto_resume_from_checkpoints overwrite_output_dir",
    "every step is recorded in `metrics.jsonl` and for TensorBoard": "logging_steps logging_strategy log_every_n_steps report_to use_wandb wandb",
    "conversations are written by the tokenizer's own chat template; `data.shape: messages` asks for it": "chat_template",
    "there is no tensor parallelism; ZeRO-3 and `engine.pipeline_stages` divide a model": "tensor_parallel_size tensor_model_parallel_size tp_size",
}
NAMES = {name: f"`{name}` is {what} here." for what, names in _SETTINGS.items() for name in names.split()} | {
    name: f"`{name}`: {what}." for what, names in _SENTENCES.items() for name in names.split()
}
"""Name, in small letters with underscores -> what to do instead, as a sentence."""
