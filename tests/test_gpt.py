"""The network against transformers': the same weights must give the same numbers,
whatever the shape and the call."""

import copy
from dataclasses import replace

import pytest
import torch
from bases import differ
from tolerance import assert_within

from minipeft.lm import GPT, GPTConfig, load_pretrained

transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
)
GPT2_SIZES = dict(
    vocab_size=61,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=64,
    bos_token_id=1,
    eos_token_id=2,
)
THETA = {"rope_type": "default", "rope_theta": 5e5}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def scaled(**fields):
    """LLAMA3 for GPTConfig, which has rope_theta beside it, with other values."""
    fields = {**LLAMA3, **fields}
    del fields["rope_theta"]
    return fields


KINDS = {
    "llama": ("LlamaConfig", SIZES),
    "llama tied, biases, grouped": (
        "LlamaConfig",
        dict(
            SIZES,
            num_key_value_heads=2,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            rope_parameters=THETA,
        ),
    ),
    "llama3 scaling, wide heads": (
        "LlamaConfig",
        dict(SIZES, head_dim=16, num_key_value_heads=1, rope_parameters=LLAMA3),
    ),
    "llama linear scaling": ("LlamaConfig", dict(SIZES, rope_parameters=LINEAR)),
    "mistral": ("MistralConfig", dict(SIZES, num_key_value_heads=2, sliding_window=40)),
    "qwen2": (
        "Qwen2Config",
        dict(SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    ),
    "qwen3": ("Qwen3Config", dict(SIZES, num_key_value_heads=2, head_dim=16)),
    "gpt2": ("GPT2Config", GPT2_SIZES),
    "gpt2, other width and activation": (
        "GPT2Config",
        dict(
            GPT2_SIZES, n_inner=40, activation_function="relu", layer_norm_epsilon=1e-3
        ),
    ),
}


def oracle(kind, seed=0, **more):
    """A tiny transformers model with every weight random: biases and norms too, which
    start as zeros and ones."""
    name, sizes = KINDS[kind]
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, name)(**{**sizes, **more})
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (1.0 if p.dim() == 1 else 0.0))
    return model


@pytest.fixture(params=KINDS, scope="module")
def pair(request, tmp_path_factory):
    """(ours, theirs) with the same weights; one for all tests of a kind, so a test that
    changes a model copies it."""
    theirs, folder = oracle(request.param), tmp_path_factory.mktemp("pair")
    theirs.save_pretrained(folder)
    return load_pretrained(folder), theirs


def close(a, b):
    """Nine sums of up to 64 terms in each of two layers."""
    assert_within(a, b, terms=64, steps=9 * 2)


class TestAgainstTransformers:
    def test_logits_and_loss(self, pair):
        ours, theirs = pair
        ids = torch.randint(0, 61, (3, 20))
        labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
        a, b = ours(ids, labels=labels), theirs(ids, labels=labels)
        close(a.logits, b.logits)
        close(a.loss, b.loss)
        close(ours(inputs_embeds=ours.get_input_embeddings()(ids)).logits, b.logits)
        close(ours(ids, logits_to_keep=2).logits, b.logits[:, -2:])
        few = ours(ids, labels=labels, labels_only=True)
        close(few.loss, b.loss)
        assert few.logits.shape == (int((labels[:, 1:] != -100).sum()), 61)

    def test_padding_on_either_side(self, pair):
        ours, theirs = pair
        ids, real = torch.randint(0, 61, (3, 12)), torch.ones(3, 12, dtype=torch.long)
        real[0, :5], real[1, 7:] = 0, 0
        where = real.bool()
        close(
            ours(ids, attention_mask=real).logits[where],
            theirs(ids, attention_mask=real).logits[where],
        )
        # as transformers' generate does, where arange is forward's own
        positions = (real.cumsum(-1) - 1).clamp(min=0)
        padded = ours(ids, attention_mask=real, position_ids=positions).logits
        close(
            padded[where],
            theirs(ids, attention_mask=real, position_ids=positions).logits[where],
        )
        # a row says the same with and without its padding
        close(padded[0, 5:], ours(ids[:1, 5:]).logits[0])
        assert padded.isfinite().all()

    def test_cache(self, pair):
        ours, theirs = pair
        ids, real = torch.randint(0, 61, (2, 12)), torch.ones(2, 12, dtype=torch.long)
        real[0, :3] = 0
        whole = theirs(ids, attention_mask=real).logits
        past = None
        for a, b in [
            (0, 5),
            (5, 6),
            (6, 7),
            (7, 12),
        ]:  # several tokens, one, one, several
            out = ours(
                ids[:, a:b],
                attention_mask=real[:, :b],
                past_key_values=past,
                use_cache=True,
            )
            past = out.past_key_values
            close(out.logits[real[:, a:b].bool()], whole[:, a:b][real[:, a:b].bool()])
        assert len(past) == 2 and past[0][0].shape[2] == 12
        whole, past = theirs(ids).logits, None
        for t in range(12):  # and without a mask
            out = ours(ids[:, t : t + 1], past_key_values=past, use_cache=True)
            past = out.past_key_values
            close(out.logits[:, 0], whole[:, t])

    def test_a_given_past_moves_the_positions(self, pair):
        """What prefix tuning does: keys and values that no token made, before the
        text."""
        ours, theirs = pair
        ids = torch.randint(0, 61, (2, 6))
        shape = ours(ids, use_cache=True).past_key_values[0][0][:, :, :4].shape
        past = [(torch.randn(shape), torch.randn(shape)) for _ in range(2)]
        cache = transformers.DynamicCache(config=theirs.config)
        for i, (k, v) in enumerate(past):
            cache.update(k, v, i)
        close(
            ours(ids, past_key_values=past).logits,
            theirs(ids, past_key_values=cache).logits,
        )

    def test_gradients(self, pair):
        ours, theirs = pair = copy.deepcopy(pair)
        ids = torch.randint(0, 61, (2, 10))
        embeds = [m.get_input_embeddings()(ids).detach().requires_grad_() for m in pair]
        for model, x in zip(pair, embeds):
            model(inputs_embeds=x, labels=ids).loss.backward()
        # nine sums of up to 64 terms in each of two layers, forth and back
        sums = dict(terms=64, steps=2 * 9 * 2)
        assert_within(embeds[0].grad, embeds[1].grad, **sums)
        assert_within(ours.lm_head.weight.grad, theirs.lm_head.weight.grad, **sums)
        last = theirs.base_model.ln_f if ours.config.is_gpt2 else theirs.base_model.norm
        assert_within(ours.model.norm.weight.grad, last.weight.grad, **sums)


class TestCheckpointing:
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing_changes_nothing(self, pair, reentrant):
        plain = copy.deepcopy(pair[0])
        checkpointed = copy.deepcopy(plain).train()
        checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert (
            checkpointed.is_gradient_checkpointing
            and not plain.is_gradient_checkpointing
        )
        ids = torch.randint(0, 61, (2, 10))
        # only the inner weights, as where adapters are trained
        for model in (plain, checkpointed):
            model.get_input_embeddings().requires_grad_(False)
            model.enable_input_require_grads()
            model(ids, labels=ids, use_cache=True).loss.backward()
        for (name, a), (_, b) in zip(
            plain.named_parameters(), checkpointed.named_parameters()
        ):
            assert (a.grad is None) == (b.grad is None), name
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, msg=name)
        checkpointed.gradient_checkpointing_disable()
        assert checkpointed(ids, use_cache=True).past_key_values is not None

    def test_checkpointing_runs_a_layer_again_and_carries_gradients_into_the_past(self):
        model = GPT(GPTConfig(**SIZES)).train()
        ids, calls = torch.randint(0, 61, (2, 5)), []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *a: calls.append(1))
        for reentrant in (None, False, True):
            if reentrant is not None:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            torch.manual_seed(0)
            past = [
                (
                    torch.randn(2, 4, 3, 8).requires_grad_(),
                    torch.randn(2, 4, 3, 8).requires_grad_(),
                )
                for _ in range(2)
            ]
            calls.clear()
            model(ids, past_key_values=past, labels=ids).loss.backward()
            assert len(calls) == (1 if reentrant is None else 2)
            grads = [t.grad for pair in past for t in pair]
            if reentrant is None:
                expected = grads
            for a, b in zip(grads, expected):
                torch.testing.assert_close(a, b, rtol=0, atol=0)


class TestAttention:
    def test_bfloat16_on_a_cpu_is_written_out_and_agrees(self, pair):
        """Autocast takes another road through attention (see attend); bfloat16 has
        eight bits, so the tolerance is wide."""
        ours, _ = pair
        ids, real = torch.randint(0, 61, (2, 12)), torch.ones(2, 12, dtype=torch.long)
        real[0, :3] = 0
        for mask in (None, real):
            exact = ours(ids, attention_mask=mask, labels=ids)
            with torch.autocast("cpu", torch.bfloat16):
                rough = ours(ids, attention_mask=mask, labels=ids)
            assert rough.loss.dtype == torch.float32
            where = (
                real.bool()
                if mask is not None
                else torch.ones_like(ids, dtype=torch.bool)
            )
            error = (rough.logits.float() - exact.logits)[where].norm() / exact.logits[
                where
            ].norm()
            assert error < 0.03

    def test_a_mask_of_four_dimensions_keeps_documents_apart(self):
        model = GPT(GPTConfig(**SIZES))
        ids = torch.randint(0, 61, (1, 9))
        document = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])
        mask = (document[:, None] == document[None]) & torch.ones(
            9, 9, dtype=torch.bool
        ).tril()
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
        together = model(
            ids, attention_mask=mask[None, None], position_ids=positions
        ).logits
        close(together[:, 4:], model(ids[:, 4:]).logits)


class TestInterface:
    def test_names_and_embeddings_are_hugging_faces(self):
        ours = GPT(
            GPTConfig(
                **SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=False
            )
        )
        theirs = oracle("llama", attention_bias=True, mlp_bias=True)
        assert set(ours.state_dict()) == set(theirs.state_dict())
        assert ours.get_output_embeddings() is ours.lm_head
        wide = torch.nn.Embedding(70, 32)
        ours.set_input_embeddings(wide)
        assert ours.get_input_embeddings() is wide and ours.model.embed_tokens is wide
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "head_dim",
        ):
            assert getattr(ours.config, name) == getattr(theirs.config, name)

    @pytest.mark.parametrize(
        "call, message",
        [
            (dict(), "either input_ids or inputs_embeds"),
            (
                dict(
                    input_ids=torch.zeros(2, 5).long(), attention_mask=torch.ones(2, 4)
                ),
                r"\(2, 4\); expected \(2, 5\)",
            ),
        ],
    )
    def test_wrong_calls(self, call, message):
        with pytest.raises(ValueError, match=message):
            GPT(GPTConfig(**SIZES))(**call)

    def test_sequences_that_would_come_out_wrong_are_refused(self):
        ids = torch.zeros(1, 9, dtype=torch.long)
        with pytest.raises(ValueError, match="sliding window of 8"):
            GPT(GPTConfig(**SIZES, model_type="mistral", sliding_window=8))(ids)
        short = GPT(
            GPTConfig(**{**SIZES, "max_position_embeddings": 8}, model_type="gpt2")
        )
        for positions in (None, torch.arange(9)[None]):
            with pytest.raises(
                ValueError, match="9 tokens are more than max_position_embeddings 8"
            ):
                short(ids, position_ids=positions)
        # one of them is padding
        short(ids, position_ids=(torch.arange(9)[None] - 1).clamp(min=0))

    @pytest.mark.parametrize(
        "fields, message",
        [
            (dict(model_type="lama"), "did you mean 'llama'"),
            (dict(hidden_act="sillu"), "did you mean 'silu'"),
            (dict(num_attention_heads=5), "cannot be shared among 5 heads"),
            (dict(model_type="qwen2", mlp_bias=True), "qwen2 has no such biases"),
            (dict(num_key_value_heads=3), "not a multiple of num_key_value_heads 3"),
            (
                dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}),
                "unknown rope_type 'yarn'",
            ),
            (
                dict(rope_scaling={"rope_type": "llama3", "factor": 2.0}),
                "lacks low_freq_factor",
            ),
            (
                dict(rope_scaling={"rope_type": "linear", "factr": 2.0}),
                "rope_scaling of type 'linear' has no 'factr' .did you mean 'factor'",
            ),
            (dict(rope_scaling={"factor": 4.0}), "of type 'default' has no 'factor'"),
            (dict(rope_scaling=LINEAR), "has no 'rope_theta'.*rope_type, factor"),
            (dict(rope_scaling={"type": "yarn"}), "unknown rope_type 'yarn'"),
            (
                dict(rope_scaling=scaled(low_freq_factor=4.0)),
                "4.0: expected .* above 4",
            ),
            (
                dict(rope_scaling=scaled(high_freq_factor=0.5)),
                "0.5: expected .* above 1",
            ),
        ],
    )
    def test_wrong_configurations(self, fields, message):
        with pytest.raises(ValueError, match=message):
            GPTConfig(**{**SIZES, **fields})

    @pytest.mark.parametrize(
        "scaling", [LINEAR, LLAMA3, {**LLAMA3, "factor": 2.0}], ids=["1", "2", "3"]
    )
    def test_the_old_key_of_rope_scaling(self, tmp_path, scaling):
        """transformers' "type", from before "rope_type"."""
        new = {key: value for key, value in scaling.items() if key != "rope_theta"}
        old = {("type" if k == "rope_type" else k): v for k, v in new.items()}
        torch.manual_seed(0)
        model = GPT(GPTConfig(**SIZES, rope_scaling=old)).eval()
        assert model.config.rope_scaling == new and "type" in old
        ids = torch.randint(0, 61, (2, 20))
        model.save_pretrained(tmp_path)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        for again in (load_pretrained(tmp_path), theirs):
            close(again(ids).logits, model(ids).logits)
        plain = GPT(GPTConfig(**SIZES)).eval()
        plain.load_state_dict(model.state_dict())
        differ(plain(ids).logits, model(ids).logits)

    @pytest.mark.parametrize(
        "field, value",
        [
            ("num_key_value_heads", 2),
            ("head_dim", 16),
            ("sliding_window", 8),
            ("rope_theta", 5e5),
            ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ],
    )
    def test_what_gpt2_has_not(self, field, value):
        """Its files have no place for it: saved, it would be another model."""
        with pytest.raises(ValueError, match=f"gpt2 has no {field} = .*; take llama"):
            GPTConfig(**SIZES, model_type="gpt2", **{field: value})

    def test_what_gpt2_has_under_another_name(self):
        config = GPTConfig(**SIZES, model_type="gpt2")
        same = dict(num_key_value_heads=4, head_dim=8, rope_theta=1e4)
        assert GPTConfig(**SIZES, model_type="gpt2", **same) == config
        assert replace(config) == config

    def test_compiled(self):
        # one layer: compiling each takes seconds
        model = GPT(GPTConfig(**SIZES | {"num_hidden_layers": 1})).eval()
        ids = torch.randint(0, 61, (2, 7))
        # lengths are symbols then
        compiled = torch.compile(
            model, backend="aot_eager", fullgraph=True, dynamic=True
        )
        for length in (7, 5, 1):
            close(compiled(ids[:, :length]).logits, model(ids[:, :length]).logits)

    def test_runs_without_memory(self):
        with torch.device("meta"):
            model, ids = (
                GPT(GPTConfig(**SIZES, model_type="gpt2")),
                torch.zeros(2, 7, dtype=torch.long),
            )
            assert model(ids, labels=ids).logits.shape == (2, 7, 61)
