"""Generation of Hugging Face models with virtual tokens, against step-by-step forward.

The oracle needs no cache and no padding: for every new token it runs the adapted model
on each row's whole text. transformers' own generate drives it, so that sampling, beams
and several sequences are compared with the same code.
"""

import contextlib
import functools

import pytest
import torch
import transformers

from minipeft import (
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TargetError,
    get_peft_model,
)

VOCABULARY, WIDTH, HEADS, LAYERS, NEW = 40, 16, 4, 2, 4
# a text that begins with padding, and one that does not
IDS = torch.tensor([[0, 0, 11, 5, 23], [7, 31, 4, 19, 8]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
GROUPED = dict(num_key_value_heads=2, head_dim=6)
ARCHITECTURES = {
    "Llama": GROUPED,
    "Mistral": GROUPED,
    "Qwen2": dict(num_key_value_heads=2),
    "Qwen3": GROUPED,
    "OPT": dict(ffn_dim=24, word_embed_proj_dim=WIDTH),
    "GPTNeoX": {},
    "GPTJ": dict(rotary_dim=2),
    "Gemma": GROUPED,
    "Gemma2": GROUPED,
    "Gemma3": GROUPED,
    "Phi": dict(num_key_value_heads=2),
    "GPT2": {},
    "Bloom": {},
    "Falcon": dict(alibi=False),
    "Falcon, one key": dict(multi_query=True, new_decoder_architecture=False),
    "Falcon, few keys": dict(num_kv_heads=2, new_decoder_architecture=True),
}
CLASSES = {"Gemma3": "Gemma3TextConfig", "GPT2": "GPT2Config"}
KINDS = {
    "prompt": PromptTuningConfig,
    "p-tuning": PromptEncoderConfig,
    "prefix": PrefixTuningConfig,
}
DECODING = {
    "greedy": {},
    "sampled": dict(do_sample=True, num_return_sequences=2),
    "beams": dict(num_beams=3, num_return_sequences=2),
}
CACHES = {
    "with a cache": {},
    "without a cache": dict(use_cache=False),
    "text in pieces": dict(prefill_chunk_size=2),
}


@functools.cache
def base_model(name):
    architecture = name.partition(",")[0]
    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    # the GPT-2 family has its own names for the feed-forward layers and the positions
    other = dict(intermediate_size=24, max_position_embeddings=48)
    config = getattr(transformers, CLASSES.get(architecture, f"{architecture}Config"))
    if architecture in ("GPTJ", "Bloom", "GPT2"):
        other = dict(n_positions=48)
    config = config(**sizes | other | ARCHITECTURES[name])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def adapted(name, kind, n=3):
    import copy

    torch.manual_seed(1)
    base = copy.deepcopy(base_model(name))
    model = get_peft_model(base, KINDS[kind](num_virtual_tokens=n)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def step_by_step(model, name, ids=IDS, mask=MASK, **options):
    """What generate writes when every step reads each row's whole text alone."""
    driver, read = base_model(name), {}

    def last_logits(text):
        if text not in read:
            ids = torch.tensor([text])
            read[text] = model(input_ids=ids, use_cache=False).logits[:, -1:]
        return read[text]

    def forward(input_ids=None, attention_mask=None, **others):
        texts = [
            tuple(row[real.bool()].tolist())
            for row, real in zip(input_ids, attention_mask)
        ]
        logits = torch.cat([last_logits(text) for text in texts])
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)

    driver.forward = forward
    try:
        return generate(driver, ids, mask, **options | dict(use_cache=False))
    finally:
        del driver.forward


@torch.no_grad()
def generate(model, ids=IDS, mask=MASK, **options):
    torch.manual_seed(2)
    defaults = dict(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    scores = dict(output_logits=True, return_dict_in_generate=True)
    return model.generate(
        input_ids=ids, attention_mask=mask, **defaults | scores | options
    )


def same(got, expected):
    assert torch.equal(got.sequences, expected.sequences)
    for own, other in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(own, other, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def check_all_ways(model, name, ids=IDS, mask=MASK, caches=CACHES):
    for decoding, options in DECODING.items():
        expected = step_by_step(model, name, ids, mask, **options)
        for cache, more in caches.items():
            try:
                same(generate(model, ids, mask, **options, **more), expected)
            except Exception as error:
                error.add_note(f"{decoding}, {cache}")
                raise


class TestGenerate:
    @pytest.mark.parametrize("kind", ["prompt", "prefix"])
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_equals_step_by_step_forward(self, name, kind):
        model = adapted(name, kind)
        check_all_ways(model, name)
        # the adapter does something, and generate leaves no trace
        first = generate(model).logits[0]
        with model.disable_adapter():
            assert (generate(model).logits[0] - first).abs().max() > 1e-3
        assert "forward" not in vars(model.get_base_model())
