"""What Hugging Face PEFT 0.21 has, as tables: default targets and fields that are not
built here. tests/test_peft_tables.py compares them with the installed PEFT.
"""

# ---- default targets: {config.model_type: target_modules} ----------------------------

Q_V = ["q_proj", "v_proj"]
QUERY_VALUE = ["query", "value"]
FUSED_QKV = ["query_key_value"]

LORA_TARGETS = {  # LoRA, DoRA, LoHa, LoKr
    "t5": ["q", "v"],
    "mt5": ["q", "v"],
    "bart": Q_V,
    "gpt2": ["c_attn"],
    "bloom": FUSED_QKV,
    "blip-2": ["q", "v", "q_proj", "v_proj"],
    "opt": Q_V,
    "gptj": Q_V,
    "gpt_neox": FUSED_QKV,
    "gpt_neo": Q_V,
    "bert": QUERY_VALUE,
    "roberta": QUERY_VALUE,
    "xlm-roberta": QUERY_VALUE,
    "electra": QUERY_VALUE,
    "deberta-v2": ["query_proj", "value_proj"],
    "deberta": ["in_proj"],
    "layoutlm": QUERY_VALUE,
    "llama": Q_V,
    "llama4": Q_V,
    "chatglm": FUSED_QKV,
    "gpt_bigcode": ["c_attn"],
    "mpt": ["Wqkv"],
    "RefinedWebModel": FUSED_QKV,
    "RefinedWeb": FUSED_QKV,
    "falcon": FUSED_QKV,
    "btlm": ["c_proj", "c_attn"],
    "codegen": ["qkv_proj"],
    "mistral": Q_V,
    "mixtral": Q_V,
    "stablelm": Q_V,
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "gemma": Q_V,
    "gemma2": Q_V,
    "gemma3_text": Q_V,
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "qwen2": Q_V,
    "qwen3": Q_V,
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "rwkv": ["key", "value", "receptance", "output"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
}

VERA_TARGETS = LORA_TARGETS | {"phi": Q_V}

ADALORA_TARGETS = {
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "gpt2": ["c_attn"],
    "bloom": FUSED_QKV,
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "gptj": Q_V,
    "gpt_neox": FUSED_QKV,
    "gpt_neo": Q_V,
    "llama": Q_V,
    "llama4": Q_V,
    "bert": QUERY_VALUE,
    "roberta": ["query", "key", "value", "dense"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
    "gpt_bigcode": ["c_attn"],
    "deberta": ["in_proj"],
    "gemma": Q_V,
    "gemma2": Q_V,
    "gemma3_text": Q_V,
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "qwen2": Q_V,
    "qwen3": Q_V,
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
}

IA3_TARGETS = {
    "t5": ["k", "v", "wo"],
    "mt5": ["k", "v", "wi_1"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bloom": ["query_key_value", "mlp.dense_4h_to_h"],
    "roberta": ["key", "value", "output.dense"],
    "opt": ["q_proj", "k_proj", "fc2"],
    "gptj": ["q_proj", "v_proj", "fc_out"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "gpt_neo": ["q_proj", "v_proj", "c_proj"],
    "bart": ["q_proj", "v_proj", "fc2"],
    "gpt_bigcode": ["c_attn", "mlp.c_proj"],
    "llama": ["k_proj", "v_proj", "down_proj"],
    "llama4": ["q_proj", "v_proj", "down_proj"],
    "mistral": ["k_proj", "v_proj", "down_proj"],
    "mixtral": ["k_proj", "v_proj", "w2"],
    "bert": ["key", "value", "output.dense"],
    "deberta-v2": ["key_proj", "value_proj", "output.dense"],
    "deberta": ["in_proj", "output.dense"],
    "RefinedWebModel": ["query_key_value", "dense_4h_to_h"],
    "RefinedWeb": ["query_key_value", "dense_4h_to_h"],
    "falcon": ["query_key_value", "dense_4h_to_h"],
    "phi": ["q_proj", "v_proj", "fc2"],
    "gemma": ["q_proj", "v_proj", "down_proj"],
    "gemma2": ["q_proj", "v_proj", "down_proj"],
    "gemma3_text": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "down_proj"],
    "qwen3": ["q_proj", "v_proj", "down_proj"],
}

# those of IA3_TARGETS whose input is scaled: the last one, but for mT5
IA3_FEEDFORWARD = {kind: names[-1:] for kind, names in IA3_TARGETS.items()} | {
    "mt5": []
}

TWO_NORMS = ["input_layernorm", "post_attention_layernorm"]
FOUR_NORMS = [*TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"]

LN_TUNING_TARGETS = {
    "llama": [*TWO_NORMS, "norm"],
    "bloom": [*TWO_NORMS, "ln_f"],
    "llava": ["multi_modal_projector", *TWO_NORMS, "norm", "embed_tokens", "lm_head"],
    "t5": ["layer_norm", "final_layer_norm"],
    "mt5": ["layer_norm", "final_layer_norm"],
    "bart": ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "blip-2": ["layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"],
    "gptj": ["ln_1", "ln_f"],
    "falcon": [*TWO_NORMS, "ln_f"],
    "mistral": [*TWO_NORMS, "norm"],
    "phi": ["input_layernorm", "final_layernorm"],
    "gemma": [*TWO_NORMS, "norm"],
    "gemma2": [*FOUR_NORMS, "norm"],
    "gemma3_text": [*FOUR_NORMS, "norm"],
    "qwen2": ["post_attention_layernorm"],
    "qwen3": ["post_attention_layernorm"],
}

# ---- tasks ---------------------------------------------------------------------------

# task_type: the names of new heads, which are trained and saved whole
TASK_HEADS = {
    "CAUSAL_LM": (),
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
    "SEQ_2_SEQ_LM": (),
    "FEATURE_EXTRACTION": (),
}

# ---- fields that are not built here --------------------------------------------------

# Notes for loaders and settings for a start: the saved numbers do not depend on them.
NOTES = {
    "auto_mapping",
    "peft_version",
    "megatron_config",
    "megatron_core",
    "runtime_config",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "tokenizer_kwargs",
}

# PEFT's field: (its values that ask for nothing, what to do instead of others)
UNSUPPORTED = {
    "auto_mapping": (None, "leave it out: only PEFT writes it, into files"),
    "megatron_config": (None, "Megatron's parallel layers are not adapted"),
    "megatron_core": ("megatron.core", "Megatron's parallel layers are not adapted"),
    "trainable_token_indices": (
        None,
        "single rows of an embedding are not trained; modules_to_save trains all of it",
    ),
    "eva_config": (None, 'init_lora_weights="eva" is not built'),
    "corda_config": (None, 'init_lora_weights="corda" is not built'),
    "lora_ga_config": (None, 'init_lora_weights="lora_ga" is not built'),
    "velora_config": (None, "VeLoRA is not built"),
    "alora_invocation_tokens": (None, "activated LoRA is not built"),
    "use_qalora": (False, "QA-LoRA is not built"),
    "qalora_group_size": (16, "QA-LoRA is not built"),
    "monteclora_config": (None, "MonteCLoRA is not built"),
    "layer_replication": (
        None,
        "layers are not repeated: build the deeper model first",
    ),
    "runtime_config": (None, "weights are not moved between devices while it runs"),
    "target_parameters": (
        None,
        "only modules get adapters, not bare parameters: name modules in"
        " target_modules",
    ),
    "use_bdlora": (None, "block-diagonal LoRA is not built"),
    "arrow_config": (None, "Arrow's routing between LoRAs is not built"),
    "kasa_config": (None, "KaSA is not built"),
    "tokenizer_kwargs": (
        None,
        "give the tokenizer itself as tokenizer_name_or_path, made with these",
    ),
}
