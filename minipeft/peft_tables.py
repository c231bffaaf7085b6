"""What Hugging Face PEFT 0.21 has, as tables: default targets and fields that are not
built here. tests/test_peft_tables.py compares them with the installed PEFT.
"""

# ---- default targets: {config.model_type: target_modules} ----------------------------

Q_V = ["q_proj", "v_proj"]
QUERY_VALUE = ["query", "value"]
FUSED_QKV = ["query_key_value"]
Q_K_V_O = ["q_proj", "k_proj", "v_proj", "o_proj"]
BART_LINEAR = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
GEMMA4 = r".*language_model\..*\.(q_proj|v_proj)"


def alike(names, *kinds):
    """The same names for several kinds of model."""
    return dict.fromkeys(kinds, names)


LORA_TARGETS = {  # LoRA, DoRA, LoHa, LoKr
    **alike(Q_V, "llama", "llama4", "mistral", "mixtral", "stablelm", "qwen2", "qwen3"),
    **alike(Q_V, "gemma", "gemma2", "gemma3_text", "bart", "opt", "gptj", "gpt_neo"),
    **alike(QUERY_VALUE, "bert", "roberta", "xlm-roberta", "electra", "layoutlm"),
    **alike(FUSED_QKV, "bloom", "gpt_neox", "chatglm", "falcon"),
    **alike(FUSED_QKV, "RefinedWebModel", "RefinedWeb"),
    **alike(["q", "v"], "t5", "mt5"),
    **alike(["c_attn"], "gpt2", "gpt_bigcode"),
    "blip-2": ["q", "v", "q_proj", "v_proj"],
    "deberta-v2": ["query_proj", "value_proj"],
    "deberta": ["in_proj"],
    "mpt": ["Wqkv"],
    "btlm": ["c_proj", "c_attn"],
    "codegen": ["qkv_proj"],
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "gemma4": GEMMA4,
    "nemotron_h": Q_K_V_O,
    "rwkv": ["key", "value", "receptance", "output"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
}

VERA_TARGETS = LORA_TARGETS | {"phi": Q_V}

ADALORA_TARGETS = {
    **alike(Q_V, "llama", "llama4", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
    **alike(Q_V, "gptj", "gpt_neo"),
    **alike(BART_LINEAR, "bart", "opt"),
    **alike(FUSED_QKV, "bloom", "gpt_neox"),
    **alike(["c_attn"], "gpt2", "gpt_bigcode"),
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "bert": QUERY_VALUE,
    "roberta": ["query", "key", "value", "dense"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
    "deberta": ["in_proj"],
    "gemma4": GEMMA4,
    "nemotron_h": Q_K_V_O,
}

IA3_TARGETS = {
    **alike(["k_proj", "v_proj", "down_proj"], "llama", "mistral"),
    **alike(["q_proj", "v_proj", "down_proj"], "llama4", "qwen2", "qwen3"),
    **alike(["q_proj", "v_proj", "down_proj"], "gemma", "gemma2", "gemma3_text"),
    **alike(["q_proj", "v_proj", "fc2"], "bart", "phi"),
    **alike(["query_key_value", "dense_4h_to_h"], "gpt_neox", "falcon"),
    **alike(["query_key_value", "dense_4h_to_h"], "RefinedWebModel", "RefinedWeb"),
    **alike(["key", "value", "output.dense"], "bert", "roberta"),
    **alike(["c_attn", "mlp.c_proj"], "gpt2", "gpt_bigcode"),
    "t5": ["k", "v", "wo"],
    "mt5": ["k", "v", "wi_1"],
    "bloom": ["query_key_value", "mlp.dense_4h_to_h"],
    "opt": ["q_proj", "k_proj", "fc2"],
    "gptj": ["q_proj", "v_proj", "fc_out"],
    "gpt_neo": ["q_proj", "v_proj", "c_proj"],
    "mixtral": ["k_proj", "v_proj", "w2"],
    "deberta-v2": ["key_proj", "value_proj", "output.dense"],
    "deberta": ["in_proj", "output.dense"],
}

# those of IA3_TARGETS whose input is scaled: the last one, but for mT5
IA3_FEEDFORWARD = {kind: names[-1:] for kind, names in IA3_TARGETS.items()} | {
    "mt5": []
}

TWO_NORMS = ["input_layernorm", "post_attention_layernorm"]
FOUR_NORMS = [*TWO_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"]

LN_TUNING_TARGETS = {
    **alike([*TWO_NORMS, "norm"], "llama", "mistral", "gemma"),
    **alike([*FOUR_NORMS, "norm"], "gemma2", "gemma3_text"),
    **alike([*TWO_NORMS, "ln_f"], "bloom", "falcon"),
    **alike(["post_attention_layernorm"], "qwen2", "qwen3"),
    **alike(["layer_norm", "final_layer_norm"], "t5", "mt5"),
    "llava": ["multi_modal_projector", *TWO_NORMS, "norm", "embed_tokens", "lm_head"],
    "bart": ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "gptj": ["ln_1", "ln_f"],
    "blip-2": ["layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"],
    "phi": ["input_layernorm", "final_layernorm"],
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

# task_type: forward's arguments by position, before output_attentions
INPUTS = ["input_ids", "attention_mask", "inputs_embeds"]
DECODER_INPUTS = [
    "decoder_input_ids",
    "decoder_attention_mask",
    "decoder_inputs_embeds",
]
TASK_ARGUMENTS = {
    **alike([*INPUTS, "labels"], "CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS"),
    "QUESTION_ANS": [
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "inputs_embeds",
        "start_positions",
        "end_positions",
    ],
    "SEQ_2_SEQ_LM": [*INPUTS, *DECODER_INPUTS, "labels"],
    "FEATURE_EXTRACTION": INPUTS,
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

# PEFT's field: what to do instead
UNSUPPORTED = {
    "auto_mapping": "leave it out: only PEFT writes it, into files",
    "megatron_config": "Megatron's parallel layers are not adapted",
    "megatron_core": "Megatron's parallel layers are not adapted",
    "trainable_token_indices": "single rows of an embedding are not trained;"
    " modules_to_save trains all of it",
    "eva_config": 'init_lora_weights="eva" is not built',
    "corda_config": 'init_lora_weights="corda" is not built',
    "lora_ga_config": 'init_lora_weights="lora_ga" is not built',
    "velora_config": "VeLoRA is not built",
    "alora_invocation_tokens": "activated LoRA is not built",
    "use_qalora": "QA-LoRA is not built",
    "qalora_group_size": "QA-LoRA is not built",
    "monteclora_config": "MonteCLoRA is not built",
    "layer_replication": "layers are not repeated: build the deeper model first",
    "runtime_config": "weights are not moved between devices while it runs",
    "target_parameters": "only modules get adapters, not bare parameters: name modules"
    " in target_modules",
    "use_bdlora": "block-diagonal LoRA is not built",
    "arrow_config": "Arrow's routing between LoRAs is not built",
    "kasa_config": "KaSA is not built",
    "tokenizer_kwargs": "give the tokenizer itself as tokenizer_name_or_path, made with"
    " these",
}
# defaults that ask for nothing, where they are not empty
NOTHING = {"megatron_core": "megatron.core", "qalora_group_size": 16}
