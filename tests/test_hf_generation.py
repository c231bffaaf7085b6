"""Generation of Hugging Face models with virtual tokens, against step-by-step forward.

The oracle needs no cache and no padding: for every new token it runs the adapted model
on each row's whole text. transformers' own generate drives it, so that sampling, beams
and several sequences are compared with the same code.
"""

import copy
import functools

import pytest
import torch
import transformers
from tolerance import assert_within

from minipeft import (
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TargetError,
    get_peft_model,
)
from minipeft.methods.kv_cache import cache_length, cache_name

VOCABULARY, WIDTH, HEADS, LAYERS, NEW = 40, 16, 4, 2, 4
SUMS = dict(terms=4 * WIDTH, steps=9 * LAYERS)  # the longest in GPT-2's MLP
# a text that begins with padding, and one that does not
IDS = torch.tensor([[0, 0, 11, 5, 23], [7, 31, 4, 19, 8]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
GROUPED = dict(num_key_value_heads=2, head_dim=6)
ARCHITECTURES = {
    "Llama": GROUPED,
    "Mistral": GROUPED,
    "Mistral, small window": GROUPED | dict(sliding_window=6),
    "Qwen2": dict(num_key_value_heads=2),
    "Qwen3": GROUPED,
    "OPT": dict(ffn_dim=24, word_embed_proj_dim=WIDTH),
    "OPT, projected": dict(ffn_dim=24, word_embed_proj_dim=8),
    "GPTNeoX": {},
    "GPTJ": dict(rotary_dim=2),
    "Gemma": GROUPED,
    "Gemma2": GROUPED,
    "Gemma3": GROUPED,
    "Gemma3, small window": GROUPED | dict(sliding_window=6),
    "Phi": dict(num_key_value_heads=2),
    "GPT2": {},
    "Bloom": {},
    "Falcon": dict(alibi=False),
    "Falcon, one key": dict(multi_query=True, new_decoder_architecture=False),
    "Falcon, few keys": dict(num_kv_heads=2, new_decoder_architecture=True),
    "Falcon, ALiBi": dict(alibi=True, multi_query=True, new_decoder_architecture=False),
    "GPTBigCode": dict(multi_query=True),
    "Mpt": {},
}
# besides those, for what virtual tokens refuse there
OTHERS = {
    "GPTNeo": dict(
        num_layers=LAYERS,
        num_heads=HEADS,
        attention_types=[[["local"], LAYERS]],
        window_size=6,
    ),
    "Jamba": dict(
        num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, num_experts=1
    ),
    "Lfm2": dict(num_key_value_heads=2, layer_types=["conv", "full_attention"]),
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
RECURRENT_CACHES = {"with a cache": {}, "without a cache": dict(use_cache=False)}
if transformers.__version__ == "5.0.0":  # "Cannot use prefill chunking without a cache"
    del CACHES["text in pieces"]


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
    if architecture in ("GPTJ", "Bloom", "GPT2", "GPTBigCode"):
        other = dict(n_positions=48)
    config = config(**sizes | other | (ARCHITECTURES | OTHERS)[name])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def adapted(name, kind, n=3):
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
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
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
        assert_within(own, other, **SUMS)


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
        mask = torch.ones_like(MASK) if "window" in name or name == "Mpt" else MASK
        caches = dict(CACHES)
        if name == "Mpt":  # "Cannot use prefill chunking without a cache", without us
            caches.pop("text in pieces", None)
        check_all_ways(model, name, mask=mask, caches=caches)
        # the adapter does something, and generate leaves no trace
        first = generate(model, mask=mask).logits[0]
        with model.disable_adapter():
            assert (generate(model, mask=mask).logits[0] - first).abs().max() > 1e-3
        assert "forward" not in vars(model.get_base_model())

    @pytest.mark.parametrize("kind", ["p-tuning"])
    @pytest.mark.parametrize("name", ["Llama", "GPT2"])
    def test_p_tuning(self, name, kind):
        check_all_ways(adapted(name, kind), name)

    @pytest.mark.parametrize("order", [["prompt", "prefix"], ["prefix", "prompt"]])
    @pytest.mark.parametrize("name", ["Llama", "Bloom", "GPTJ"])
    def test_a_prompt_and_a_prefix_together(self, name, order):
        model = adapted(name, "prompt")
        model.add_adapter("prefix", PrefixTuningConfig(num_virtual_tokens=2))
        model.set_adapter(["default" if kind == "prompt" else kind for kind in order])
        check_all_ways(
            model,
            name,
            caches={"with a cache": {}, "without a cache": dict(use_cache=False)},
        )

    @pytest.mark.parametrize("kind", ["prompt", "prefix"])
    @pytest.mark.parametrize("name", ["Llama", "Qwen2", "Gemma2", "GPT2", "Bloom"])
    def test_a_static_cache_is_refused(self, name, kind):
        model = adapted(name, kind)
        with pytest.raises(ValueError, match="static cache.*Leave out"):
            generate(model, cache_implementation="static")

    @pytest.mark.parametrize("kind", ["prompt", "prefix"])
    @pytest.mark.parametrize("how", ["given", "its own", "an object", "in forward"])
    def test_a_static_cache_that_is_asked_for_elsewhere(self, how, kind):
        model = adapted("Llama", kind)
        config = model.get_base_model().config
        cache = transformers.StaticCache(config, max_cache_len=20)
        cache = {cache_name(model.get_base_model()): cache}
        given = transformers.GenerationConfig(
            cache_implementation="static", pad_token_id=0, max_new_tokens=2
        )
        if how == "its own":
            model.generation_config.cache_implementation = "static"
        options = {"given": dict(generation_config=given), "an object": cache}
        with pytest.raises(ValueError, match="static cache.*Leave out"):
            if how == "in forward":
                model(input_ids=IDS, **cache)
            else:
                options = options.get(how, {})
                model.generate(IDS, attention_mask=MASK, **options)

    @pytest.mark.parametrize("name", ["Llama", "GPT2", "OPT"])
    def test_a_mixed_batch_with_a_cache_is_refused(self, name):
        model = adapted(name, "prompt")
        cache = transformers.DynamicCache()
        for option in (
            dict(cache=cache),
            dict(past_key_values=cache),
            dict(use_cache=True),
        ):
            with pytest.raises(ValueError, match="one at a time"):
                model(input_ids=IDS, adapter_names=["default", "__base__"], **option)

    @pytest.mark.parametrize("kind", ["prompt", "prefix"])
    @pytest.mark.parametrize("name", ["Llama", "Phi"])
    def test_assisted_generation_is_refused(self, name, kind):
        model = adapted(name, kind)
        for options in (
            dict(prompt_lookup_num_tokens=2),
            dict(assistant_model=base_model(name)),
            dict(
                generation_config=transformers.GenerationConfig(
                    prompt_lookup_num_tokens=2
                )
            ),
        ):
            with pytest.raises(ValueError, match="assisted generation.*leave it out"):
                model.generate(IDS, **options)

    @pytest.mark.parametrize("kind", ["prompt", "prefix"])
    def test_an_earlier_cache_is_refused(self, kind):
        """generate would take its virtual tokens for the beginning of the text."""
        model = adapted("Llama", kind)
        cache = transformers.DynamicCache()
        name = cache_name(model.get_base_model())
        with torch.no_grad():
            model(input_ids=IDS[1:], **{name: cache}, use_cache=True)
        with pytest.raises(ValueError, match="give the whole text"):
            model.generate(IDS[1:], **{name: cache})

    @pytest.mark.parametrize("kind", KINDS)
    def test_left_padding_that_a_model_counts_is_refused(self, kind):
        """MPT's ALiBi is measured in places, padding included."""
        model = adapted("Mpt", kind)
        for call in (generate, lambda model: model(IDS, attention_mask=MASK)):
            with pytest.raises(ValueError, match="mpt counts the padding.*pad on the"):
                call(model)
        right = MASK.flip(1)
        together = model(IDS, attention_mask=right).logits[0, -5:-2]
        alone = model(IDS[:1, :3]).logits[0, -3:]
        assert_within(together, alone, **SUMS)

    @pytest.mark.parametrize("kind", ["prompt", "prefix"])
    @pytest.mark.parametrize("name", ["Mistral, small window", "Gemma3, small window"])
    def test_left_padding_beyond_a_sliding_window_is_refused(self, name, kind):
        with pytest.raises(ValueError, match="sliding window of 6.*pad on the right"):
            generate(adapted(name, kind))

    @pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
    @pytest.mark.parametrize("name", ["Jamba", "Lfm2"])
    def test_left_padding_before_a_recurrent_layer_is_refused(self, name, kind):
        """Such a layer goes through the padding after the virtual tokens."""
        model = adapted(name, kind)
        for call in (generate, lambda model: model(IDS, attention_mask=MASK)):
            with pytest.raises(ValueError, match="counts the padding.*pad on the"):
                call(model)
        check_all_ways(model, name, IDS[1:], MASK[1:], RECURRENT_CACHES)

    @pytest.mark.parametrize("kind", KINDS)
    def test_left_padding_beyond_a_local_window_is_refused(self, kind):
        """GPT-Neo calls it window_size."""
        model = adapted("GPTNeo", kind)
        with pytest.raises(ValueError, match="sliding window of 6.*pad on the right"):
            generate(model)
        check_all_ways(model, "GPTNeo", IDS[1:], MASK[1:])


class TestForward:
    @pytest.mark.parametrize("name", ["Llama", "GPT2", "Falcon, one key"])
    @torch.no_grad()
    def test_the_cache_comes_back_where_it_is_asked_for(self, name):
        """A prefix needs a cache, which its caller need not hear of."""
        model = adapted(name, "prefix")
        field = cache_name(model.get_base_model())
        for return_dict in (True, False):
            silent = model(IDS, use_cache=False, return_dict=return_dict)
            assert len(silent) == 1 and silent[0].shape == (*IDS.shape, VOCABULARY)
        assert cache_length(model(IDS, use_cache=True)[field]) == 3 + IDS.shape[1]
        given = transformers.DynamicCache()
        output = model(IDS, **{field: given}, use_cache=True)
        assert output[field] is given

    @pytest.mark.parametrize("kind", ["prompt", "prefix"])
    @pytest.mark.parametrize("name", ["Llama", "GPT2", "Bloom"])
    @torch.no_grad()
    def test_either_name_of_the_cache_works(self, name, kind):
        """past_key_values until transformers 5.23, cache since."""
        model, ids = adapted(name, kind), IDS[1:]
        whole = model(input_ids=ids, use_cache=False).logits[:, -2:]
        for field in {"past_key_values", cache_name(model.get_base_model())}:
            cache = transformers.DynamicCache()
            model(input_ids=ids[:, :3], **{field: cache}, use_cache=True)
            rest = model(input_ids=ids[:, 3:], **{field: cache}, use_cache=True).logits
            assert_within(rest, whole, **SUMS)

    @pytest.mark.parametrize("kind", ["prompt", "prefix"])
    @torch.no_grad()
    def test_arguments_by_position_stand_in_peft_s_order(self, kind):
        """The second of LlamaForCausalLM is the mask, of GPT2LMHeadModel the cache."""
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
        for name in ("Llama", "GPT2"):
            model = adapted(name, kind)
            by_name = model(input_ids=IDS, attention_mask=mask).logits
            assert torch.equal(model(IDS, mask).logits, by_name)

    def test_token_type_ids_are_refused(self):
        with pytest.raises(ValueError, match="token_type_ids"):
            adapted("GPT2", "prompt")(input_ids=IDS, token_type_ids=IDS)


class TestOtherModels:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "name, lacks",
        [
            ("ViTForImageClassification", "input_ids"),
            ("T5ForConditionalGeneration", "it has an encoder"),
            ("Wav2Vec2ForCTC", "input_ids"),
        ],
    )
    def test_what_is_not_a_decoder_is_refused(self, name, lacks, kind):
        with pytest.raises(TargetError, match=f"decoder-only.*{name} lacks.*{lacks}"):
            get_peft_model(on_meta(name), KINDS[kind](num_virtual_tokens=2))

    @pytest.mark.parametrize(
        "name, reason",
        [
            ("BertForMaskedLM", "takes no cache"),
            ("DeepseekV3ForCausalLM", "compressed"),
            ("Qwen3NextForCausalLM", "not all of its layers are attention"),
        ],
    )
    def test_a_prefix_needs_plain_keys_and_values(self, name, reason):
        with pytest.raises(TargetError, match=f"{name}: .*{reason}.*PromptTuning"):
            get_peft_model(on_meta(name), PrefixTuningConfig(num_virtual_tokens=2))


def on_meta(name):
    """A model of default size without memory."""
    model = getattr(transformers, name)
    with torch.device("meta"):
        return model(model.config_class())
