"""Prefix tuning: He et al.'s identity, starting from a text, zero is not nothing, and
gradient checkpointing."""

import peft
import pytest
import torch
from bases import BASES, close, differ, inputs, loss_of, run, shake
from test_prompt import Letters

import minipeft
from minipeft import (
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    initialize_kv_prefix_from_text,
)
from minipeft.lm.gpt import attend


class TestAttention:
    def test_he_et_al_s_identity(self):
        """Attn(q, [P_K; K], [P_V; V]) = (1 - g) Attn(q, K, V) + g Attn(q, P_K, P_V),
        where g is the prefix's share of the softmax."""
        torch.manual_seed(0)
        # 4 heads of queries, 2 of keys
        q, (K, V) = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 2, 5, 8)
        PK, PV = torch.randn(2, 2, 2, 3, 8)
        causal, everywhere = torch.ones(5, 5).tril().bool(), torch.ones(5, 3).bool()
        mask = torch.cat((everywhere, causal), 1)[None, None]
        together = attend(q, torch.cat((PK, K), 2), torch.cat((PV, V), 2), mask)

        def mass(keys, mask):
            scores = q @ keys.repeat_interleave(2, 1).transpose(-1, -2) / 8**0.5
            return scores.masked_fill(~mask, -torch.inf).exp().sum(-1, keepdim=True)

        g = mass(PK, everywhere) / (
            mass(PK, everywhere) + mass(K, causal)
        )  # (B, H, T, 1)
        apart = (1 - g) * attend(q, K, V, causal[None, None]) + g * attend(
            q, PK, PV, everywhere[None, None]
        )
        close(together, apart)
        assert 0.05 < g.mean() < 0.95

    def test_the_text_s_positions_start_after_the_prefix(self):
        """A prefix takes n places: without the shift the text would stand elsewhere."""
        base, ids = BASES["gpt2"].make(), inputs()["input_ids"]
        model = shake(get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=3)))
        shifted = torch.arange(3, 9)[None]
        past = model.base_model.adapters["default"].key_values(3, torch.float32)
        with torch.no_grad():
            expected, wrong = (
                base(ids, position_ids=p, past_key_values=past).logits
                for p in (shifted, shifted - 3)
            )
            close(run(model), expected)
            # positions are those of the text
            close(model(ids, position_ids=shifted - 3).logits, expected)
        differ(run(model), wrong)

    def test_every_layer_has_its_own_keys_and_values(self):
        """The layout in files: key and value of layer 0, then of layer 1, each (heads,
        head_dim)."""
        from minipeft.methods.prefix import Prefix

        # 2 tokens, 3 layers, 4 heads of 5
        flat = torch.arange(2 * 2 * 3 * 4 * 5.0).view(2, -1)
        pairs = Prefix(flat, num_layers=3, heads=4).key_values(6, torch.float32)
        assert len(pairs) == 3 and pairs[0][0].shape == (6, 4, 2, 5)
        for layer, pair in enumerate(pairs):
            for which, kv in enumerate(pair):
                for token in range(2):
                    start = (2 * layer + which) * 20
                    assert torch.equal(
                        kv[3, :, token].flatten(), flat[token, start : start + 20]
                    )


class TestStartFromText:
    @pytest.mark.parametrize("base", ["llama", "gpt2", "hf_llama", "hf_gpt2"])
    def test_equals_the_text(self, base):
        model = get_peft_model(
            BASES[base].make(), PrefixTuningConfig(num_virtual_tokens=3)
        )
        initialize_kv_prefix_from_text(model, Letters(), text="cat")
        text = torch.cat((torch.tensor([[12, 10, 29]] * 3), inputs()["input_ids"]), 1)
        with torch.no_grad():
            close(run(model), BASES[base].make()(input_ids=text).logits[:, 3:])

    @pytest.mark.parametrize("base", ["hf_llama", "hf_gpt2"])
    def test_equals_peft_s(self, base):
        class Callable(Letters):
            def __call__(self, text, **options):
                return {"input_ids": torch.tensor([self.encode(text)])}

        fields = dict(num_virtual_tokens=3, task_type="CAUSAL_LM")
        theirs = peft.get_peft_model(
            BASES[base].make(), peft.PrefixTuningConfig(**fields)
        )
        expected = peft.initialize_kv_prefix_from_text(theirs, Callable(), text="dog")
        ours = get_peft_model(BASES[base].make(), PrefixTuningConfig(**fields))
        initialize_kv_prefix_from_text(ours, Letters(), text="dog")
        close(ours.base_model.adapters["default"].prompt_embeddings.detach(), expected)
        close(run(ours), run(theirs))

    def test_what_is_refused(self):
        model = get_peft_model(
            BASES["llama"].make(), PrefixTuningConfig(num_virtual_tokens=3)
        ).train()
        with pytest.raises(
            minipeft.ConfigError, match="5 tokens, which do not fit into 3"
        ):
            initialize_kv_prefix_from_text(model, Letters(), text="house")
        initialize_kv_prefix_from_text(model, Letters(), text="a")  # repeated
        assert model.training
        projected = PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True)
        for other in (projected, PromptTuningConfig(num_virtual_tokens=3)):
            with pytest.raises(
                minipeft.ConfigError, match="only a prefix without projection"
            ):
                initialize_kv_prefix_from_text(
                    get_peft_model(BASES["llama"].make(), other), Letters(), text="cat"
                )
        with pytest.raises(minipeft.ConfigError, match="'ones'"):
            PrefixTuningConfig(num_virtual_tokens=3, init_weights="ones")


class TestStartFromZero:
    @pytest.mark.parametrize("projected", [False, True])
    def test_zeros_are_not_nothing(self, projected):
        """Zero keys have the score 0, so they take attention, and zero values dilute
        the rest."""
        config = PrefixTuningConfig(
            num_virtual_tokens=3, init_weights="zero", prefix_projection=projected
        )
        model = get_peft_model(BASES["llama"].make(), config)
        assert model.base_model.adapters["default"].embeddings().abs().max() == 0
        differ(run(model), run(BASES["llama"].make()), 1e-2)

    def test_zeros_stay_alike(self):
        """Equal virtual tokens get equal gradients, so n of them do the work of one; in
        PEFT too."""
        fields = dict(num_virtual_tokens=4, task_type="CAUSAL_LM", init_weights="zero")
        for package, config in (
            (minipeft, PrefixTuningConfig),
            (peft, peft.PrefixTuningConfig),
        ):
            model = package.get_peft_model(BASES["hf_llama"].make(), config(**fields))
            (prefix,) = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.Adam([prefix], lr=0.1)
            for _ in range(3):
                loss_of(model).backward()
                optimizer.step()
                optimizer.zero_grad()
            assert prefix.abs().max() > 0.1
            close(prefix, prefix[:1].expand_as(prefix))


class TestCheckpointing:
    def test_refused_where_the_prefix_would_be_lost(self):
        for name in ("hf_llama", "hf_gpt2"):
            model = get_peft_model(
                BASES[name].make(), PrefixTuningConfig(num_virtual_tokens=3)
            ).train()
            model.gradient_checkpointing_enable()
            with pytest.raises(
                ValueError,
                match="not work with gradient checkpointing.*PromptTuningConfig",
            ):
                model(**inputs())
            model.eval()
            differ(run(model), run(BASES[name].make()))
            model.train().gradient_checkpointing_disable()
            model(**inputs()).logits.sum().backward()
            assert (
                model.base_model.adapters["default"].prompt_embeddings.grad.abs().max()
                > 0
            )
