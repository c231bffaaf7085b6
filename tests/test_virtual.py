"""Virtual tokens against Hugging Face PEFT; padding, positions, caches; with each other
and with LoRA."""

import copy
import warnings
from functools import partial

import peft
import pytest
import torch
from bases import BASES, close, differ, inputs, rounding, run, shake
from safetensors.torch import load_file

import minipeft
from minipeft import (
    AdapterFileError,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from minipeft.lm.generation import generate_ids
from minipeft.methods.kv_cache import cache_name

N = 3
KINDS = {  # (the configuration's name, its fields)
    "prompt": ("PromptTuningConfig", {}),
    "prompt of words": ("PromptTuningConfig", dict(prompt_tuning_init="SAMPLE_VOCAB")),
    "p-tuning": ("PromptEncoderConfig", dict(encoder_hidden_size=8)),
    "p-tuning, lstm": (
        "PromptEncoderConfig",
        dict(
            encoder_reparameterization_type="LSTM",
            encoder_hidden_size=8,
            encoder_num_layers=1,
        ),
    ),
    "prefix": ("PrefixTuningConfig", {}),
    "prefix of zeros": ("PrefixTuningConfig", dict(init_weights="zero")),
    "prefix, projected": (
        "PrefixTuningConfig",
        dict(prefix_projection=True, encoder_hidden_size=8),
    ),
    "prefix, projected to zero": (
        "PrefixTuningConfig",
        dict(prefix_projection=True, init_weights="zero"),
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS)
three = pytest.mark.parametrize("kind", ["prompt", "p-tuning", "prefix"])


def config(kind, package=minipeft, n=N, **more):
    name, fields = KINDS[kind]
    return getattr(package, name)(
        num_virtual_tokens=n, task_type="CAUSAL_LM", **fields, **more
    )


def made(kind, base, package=minipeft, seed=0, n=N):
    """A model with a shaken adapter, the same one of either package for a seed."""
    torch.manual_seed(seed)
    model = package.get_peft_model(BASES[base].make(), config(kind, package, n)).eval()
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape)
    return model


def padded():
    """Rows padded on the right, on the left, and not at all; positions that begin at
    each row's text."""
    ids, mask = inputs()["input_ids"], torch.ones(3, 6, dtype=torch.long)
    mask[0, 4:], mask[1, :2] = 0, 0
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def run_on(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


class TestAgainstPeft:
    @kinds
    @pytest.mark.parametrize("base", ["hf_llama", "hf_gpt2", "hf_qwen2"])
    def test_training_and_files_equal_peft_s(self, kind, base, tmp_path):
        ours, theirs = made(kind, base), made(kind, base, peft)
        ids, mask, _ = padded()
        outputs = [
            model(
                input_ids=ids,
                attention_mask=mask,
                labels=ids.masked_fill(mask == 0, -100),
            )
            for model in (ours, theirs)
        ]
        # a prompt's own places come out too
        assert outputs[0].logits.shape == outputs[1].logits.shape
        close(outputs[0].logits.detach(), outputs[1].logits.detach())
        close(outputs[0].loss.detach(), outputs[1].loss.detach())
        pairs = list(
            zip(
                *(
                    [p for p in model.parameters() if p.requires_grad]
                    for model in (ours, theirs)
                ),
                strict=True,
            )
        )
        for output in outputs:
            output.loss.backward()
        assert any(own.grad.abs().max() > 1e-4 for own, _ in pairs)
        for own, other in pairs:
            close(own.grad, other.grad)
            torch.optim.SGD([own, other], lr=0.5).step()
            close(own.detach(), other.detach())
        ours.save_pretrained(tmp_path / "ours")
        theirs.save_pretrained(str(tmp_path / "theirs"))
        own, other = (
            load_file(tmp_path / name / "adapter_model.safetensors")
            for name in ("ours", "theirs")
        )
        assert own.keys() == other.keys() == {"prompt_embeddings"}
        close(own["prompt_embeddings"], other["prompt_embeddings"])
        close(
            run(PeftModel.from_pretrained(BASES[base].make(), tmp_path / "theirs")),
            run(theirs),
        )
        again = peft.PeftModel.from_pretrained(
            BASES[base].make(), str(tmp_path / "ours")
        )
        close(run(again), run(ours))
        written = [
            peft.PeftConfig.from_pretrained(str(tmp_path / name))
            for name in ("ours", "theirs")
        ]
        for field in (
            "token_dim",
            "num_layers",
            "num_attention_heads",
            "num_virtual_tokens",
            "task_type",
        ):
            assert getattr(written[0], field) == getattr(written[1], field), field

    @kinds
    def test_our_gpt_equals_peft_on_its_twin(self, kind, tmp_path):
        from minipeft.lm import load_pretrained

        theirs = made(kind, "hf_llama", peft)
        theirs.get_base_model().save_pretrained(tmp_path / "base")
        theirs.save_pretrained(str(tmp_path / "adapter"))
        ours = PeftModel.from_pretrained(
            load_pretrained(tmp_path / "base"), tmp_path / "adapter"
        )
        close(run(ours), run(theirs))
        ids, mask, _ = padded()
        labels = ids.masked_fill(mask == 0, -100)
        # predicted from padding, which in our GPT sees itself, in theirs not
        labels[1, 2] = -100
        given = dict(input_ids=ids, attention_mask=mask, labels=labels)
        close(ours(**given).loss.detach(), theirs(**given).loss.detach())

    @pytest.mark.skipif(
        cache_name(BASES["hf_llama"].make()) == "cache",
        reason="PEFT 0.21 generates wrong text since transformers 5.24",
    )
    @kinds
    @pytest.mark.parametrize("base", ["hf_llama", "hf_gpt2"])
    def test_generated_text_equals_peft_s(self, kind, base):
        for options in (dict(), dict(num_beams=3), dict(repetition_penalty=1.5)):
            texts = [
                model.generate(
                    **inputs(),
                    attention_mask=torch.ones(3, 6, dtype=torch.long),
                    max_new_tokens=6,
                    do_sample=False,
                    **options,
                )
                for model in (made(kind, base), made(kind, base, peft))
            ]
            assert torch.equal(*texts)

    def test_padded_rows_keep_the_positions_that_peft_loses(self):
        """PEFT's prompts ignore position_ids, also those that generate computes from
        the mask of padded rows."""
        ids, mask, _ = padded()
        mask[0] = 1
        ours, theirs = made("prompt", "hf_gpt2"), made("prompt", "hf_gpt2", peft)
        options = dict(
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        alone = run_on(ours, ids[1:2, 2:])[0, -1]
        close(
            ours.generate(input_ids=ids, attention_mask=mask, **options).logits[0][1],
            alone,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            differ(
                theirs.generate(input_ids=ids, attention_mask=mask, **options).logits[
                    0
                ][1],
                alone,
            )


class TestForward:
    @three
    @pytest.mark.parametrize("base", ["llama", "gpt2", "hf_llama", "hf_gpt2"])
    def test_padding_on_either_side_changes_nothing(self, kind, base):
        model = made(kind, base)
        ids, mask, positions = padded()
        with torch.no_grad():
            together = model(
                input_ids=ids, attention_mask=mask, position_ids=positions
            ).logits[:, -6:]
            assert torch.equal(mask.bool(), mask == 1)
            as_bool = model(
                input_ids=ids, attention_mask=mask.bool(), position_ids=positions
            ).logits[:, -6:]
            for row, real in enumerate(mask.bool()):
                alone = model(input_ids=ids[row : row + 1, real]).logits[
                    0, -int(real.sum()) :
                ]
                close(together[row, real], alone)
                close(as_bool[row, real], alone)
            with pytest.raises(ValueError, match="attention_mask of .rows, tokens."):
                model(input_ids=ids, attention_mask=mask[:, None, None])

    def test_embeddings_in_place_of_ids(self):
        for kind in ("prompt", "prefix"):
            model = made(kind, "llama")
            x = model.get_input_embeddings()(inputs()["input_ids"])
            close(model(inputs_embeds=x).logits[:, -6:], run(model))

    @pytest.mark.parametrize("kind", ["prompt", "p-tuning"])
    @pytest.mark.parametrize("name", ["Albert", "Electra", "OPT"])
    def test_embeddings_narrower_than_the_model(self, kind, name):
        """Then the prompt is as wide as they are."""
        import transformers

        width = "word_embed_proj_dim" if name == "OPT" else "embedding_size"
        base = getattr(transformers, f"{name}Model")(
            getattr(transformers, f"{name}Config")(
                vocab_size=40,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                pad_token_id=0,
                **{width: 8},
            )
        ).eval()
        ids, embed = inputs()["input_ids"], base.get_input_embeddings()
        plain = copy.deepcopy(base)
        model = shake(get_peft_model(base, config(kind)))
        P = model.base_model.adapters["default"].embeddings()
        assert P.shape == (N, 8)
        x = torch.cat((P.expand(3, -1, -1), embed(ids)), dim=1)
        close(model(input_ids=ids)[0].detach(), plain(inputs_embeds=x)[0].detach())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @three
    def test_autocast_and_16_bits(self, kind, dtype):
        model = made(kind, "llama")
        exact = run(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            rounded = run(
                made(kind, "llama") if dtype == torch.float32 else model.to(dtype)
            )
        assert rounded.dtype == torch.bfloat16
        # inputs, weights and results are rounded
        close(rounded.float(), exact, rounding(3, torch.bfloat16))

    def test_parameter_counts(self):
        d, layers, d_kv = 16, 2, 8  # of hf_llama, which has 2 key-value heads for 4
        for kind, count in {
            "prompt": N * d,
            "prefix": N * 2 * layers * d_kv,
            "p-tuning": N * d + (d * 8 + 8) + (8 * 8 + 8) + (8 * d + d),
            "prefix, projected": N * d_kv
            + (d_kv * 8 + 8)
            + (8 + 1) * 2 * layers * d_kv,
        }.items():
            assert (
                get_peft_model(
                    BASES["hf_llama"].make(), config(kind)
                ).get_nb_trainable_parameters()[0]
                == count
            )

    def test_invalid_configurations_are_refused(self):
        for make in (PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig):
            for n in (None, 0, -2, 1.5, True):
                with pytest.raises(minipeft.ConfigError, match="num_virtual_tokens"):
                    make(num_virtual_tokens=n)
            with pytest.raises(minipeft.ConfigError, match="CAUSAL_LM"):
                make(num_virtual_tokens=2, task_type="SEQ_2_SEQ_LM")
            with pytest.raises(
                minipeft.ConfigError, match="token_dim = 99, but this model's is"
            ):
                get_peft_model(
                    BASES["llama"].make(), make(num_virtual_tokens=2, token_dim=99)
                )
            with pytest.raises(minipeft.TargetError, match="language model"):
                get_peft_model(BASES["mlp"].make(), make(num_virtual_tokens=2))
        # 30 and 6 in GPT-2's 32 places
        with pytest.raises(ValueError, match="40 tokens|more than max_position"):
            get_peft_model(BASES["gpt2"].make(), config("prompt", n=30))(**inputs())


class TestGeneration:
    @kinds
    @pytest.mark.parametrize(
        "base", ["llama", "gpt2", "hf_llama", "hf_gpt2", "hf_mistral"]
    )
    def test_a_cache_changes_nothing(self, kind, base):
        """Our loop and the model's own generate write what one gets without any cache,
        padded or not."""
        model = made(kind, base)
        ids, mask, _ = padded()
        mask[0] = 1  # generation pads on the left
        expected = []
        for row, real in enumerate(mask.bool()):
            text = ids[row : row + 1, real]
            for _ in range(5):  # the whole text anew for every token
                text = torch.cat((text, run_on(model, text)[:, -1:].argmax(-1)), 1)
            expected.append(text[0, -5:])
        expected = torch.stack(expected)
        with torch.no_grad():
            options = dict(
                attention_mask=mask,
                max_new_tokens=5,
                eos_token_id=-1 if base in ("llama", "gpt2") else None,
            )
            assert torch.equal(
                generate_ids(model, ids, mask, max_new_tokens=5, eos_token_id=-1)[
                    :, 6:
                ],
                expected,
            )
            if base.startswith("hf"):
                options |= dict(do_sample=False, eos_token_id=None, pad_token_id=0)
                model.generation_config.eos_token_id = None
            forward = vars(model.get_base_model()).get("forward")
            assert torch.equal(
                model.generate(input_ids=ids, **options)[:, 6:], expected
            )
            assert vars(model.get_base_model()).get("forward") is forward
            with model.disable_adapter():
                assert not torch.equal(
                    model.generate(input_ids=ids, **options)[:, 6:], expected
                )

    def test_a_copy_of_the_model_keeps_its_own_forward(self):
        model = made("prompt", "hf_llama")
        twin = copy.deepcopy(model)
        shake(twin)
        options = dict(max_new_tokens=4, do_sample=False)
        before = model.generate(**inputs(), **options)
        twin.generate(**inputs(), **options)
        assert torch.equal(model.generate(**inputs(), **options), before)


class TestSeveralAdapters:
    @pytest.mark.parametrize("base", ["llama", "hf_llama", "hf_gpt2"])
    @pytest.mark.parametrize(
        "names",
        [
            ["prompt", "lora"],
            ["prefix", "lora"],
            ["prompt", "prefix"],
            ["prefix", "prompt"],
            ["prompt", "other"],
            ["prefix", "prefix2", "prompt", "lora"],
        ],
    )
    def test_several_at_once(self, base, names):
        """Equal to the same by hand: all prompts before the text, all prefixes in the
        cache, LoRA inside."""
        torch.manual_seed(0)
        model = get_peft_model(BASES[base].make(), config("prompt"), "prompt").eval()
        model.add_adapter("other", config("prompt", n=2))
        model.add_adapter("prefix", config("prefix"))
        model.add_adapter("prefix2", config("prefix", n=2))
        model.add_adapter(
            "lora",
            LoraConfig(
                init_lora_weights=False, target_modules=list(BASES[base].targets)
            ),
        )
        part, ids = model.base_model.adapters, inputs()["input_ids"]
        model.set_adapter(["lora"] if "lora" in names else [])
        x = model.get_input_embeddings()(ids)
        # the first stands next to the model: its vectors come first
        for name in reversed(names):
            if name in ("prompt", "other"):
                x = torch.cat((part[name].prompt_embeddings.expand(3, -1, -1), x), 1)
        pairs = [
            part[name].key_values(3, torch.float32)
            for name in names
            if name.startswith("prefix")
        ]
        past = None
        if pairs:
            from minipeft.methods.kv_cache import extend_cache

            pairs = [[torch.cat(kv, 2) for kv in zip(*layer)] for layer in zip(*pairs)]
            past = extend_cache(None, pairs, model.get_base_model())
        with torch.no_grad():
            expected = model(
                inputs_embeds=x, **{cache_name(model.get_base_model()): past}
            ).logits[:, -6:]
        model.set_adapter(names)
        together = run(model)
        close(together, expected)
        differ(together, run(BASES[base].make()))
        tokens = generate_ids(model, ids, max_new_tokens=4, eos_token_id=-1)
        if base.startswith("hf"):
            model.generation_config.eos_token_id = None
            options = dict(
                attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
            )
            assert torch.equal(model.generate(ids, **options), tokens)
        text = ids
        for _ in range(4):
            text = torch.cat((text, run_on(model, text)[:, -1:].argmax(-1)), 1)
        assert torch.equal(text, tokens)
        model(input_ids=ids).logits.sum().backward()
        trained = [
            part for name in names for part in model._adapters_by_path(name).values()
        ]
        assert all(p.grad is not None for part in trained for p in part.parameters())

    @pytest.mark.parametrize("base", ["llama", "hf_llama"])
    def test_rows_with_different_prompts_or_none(self, base):
        torch.manual_seed(0)
        model = get_peft_model(BASES[base].make(), config("prompt"), "prompt").eval()
        model.add_adapter("prefix", config("prefix", n=2))
        model.add_adapter("lora", LoraConfig(init_lora_weights=False))
        ids, mask, positions = padded()
        given = dict(attention_mask=mask, position_ids=positions)
        names = ["prefix", "__base__", "prompt"]
        with torch.no_grad():
            mixed = model(input_ids=ids, **given, adapter_names=names).logits
            for row, name in enumerate(names):
                one = {key: value[row : row + 1] for key, value in given.items()}
                alone = model(
                    input_ids=ids[row : row + 1], **one, adapter_names=[name]
                ).logits
                close(mixed[row], alone[0, -6:])
            for rows in (["prefix", "lora", "prompt"], ["lora", "prompt", "lora"]):
                differ(run(model, adapter_names=rows), run(model, adapter_names=names))
        for name in ("prompt", "prefix"):
            for call in (model.generate, partial(generate_ids, model)):
                with pytest.raises(ValueError, match="one at a time"):
                    call(
                        ids, max_new_tokens=2, adapter_names=[name, "lora", "__base__"]
                    )
        for asked in ("output_hidden_states", "output_attentions"):
            with pytest.raises(ValueError, match=f"{asked}: .* one adapter at a time"):
                model(**inputs(), adapter_names=names, **{asked: True})
        lora = [
            "lora",
            "__base__",
            "lora",
        ]  # rows that need nothing in front are as ever
        assert model.generate(ids, max_new_tokens=2, adapter_names=lora).shape[0] == 3

    def test_modules_to_save_beside_a_prompt(self, tmp_path):
        model = shake(
            get_peft_model(
                BASES["hf_llama"].make(), config("prompt", modules_to_save=["lm_head"])
            )
        )
        model.save_pretrained(tmp_path)
        assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2
        close(
            run(PeftModel.from_pretrained(BASES["hf_llama"].make(), tmp_path)),
            run(model),
        )


class TestLoading:
    def test_a_loaded_prompt_can_be_trained(self, tmp_path):
        """The output of P-tuning's encoder is loaded as a plain prompt, and trained as
        one."""
        for kind in ("p-tuning", "prefix, projected"):
            model = made(kind, "llama")
            model.save_pretrained(tmp_path)
            again = PeftModel.from_pretrained(
                BASES["llama"].make(), tmp_path, is_trainable=True
            )
            assert torch.equal(run(again), run(model))
            assert [
                name for name, p in again.named_parameters() if p.requires_grad
            ] == ["base_model.adapters.default.prompt_embeddings"]
            again(**inputs()).logits.sum().backward()
            assert (
                again.base_model.adapters["default"].prompt_embeddings.grad.abs().max()
                > 1e-4
            )

    @pytest.mark.parametrize(
        "kind", ["p-tuning", "p-tuning, lstm", "prefix, projected"]
    )
    def test_training_does_not_go_on_without_its_encoder(self, kind, tmp_path):
        """The optimizer knows the encoder's parameters, which no file holds."""
        model = made(kind, "hf_llama")
        model.save_pretrained(tmp_path)
        before = model.state_dict()
        with pytest.raises(AdapterFileError, match="'default'.*encoder is not in"):
            model.load_adapter(tmp_path, "default", is_trainable=True)
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(after[key], before[key]) for key in before)

    @pytest.mark.parametrize(
        "kind", ["prompt", "prefix", "p-tuning", "p-tuning, lstm", "prefix, projected"]
    )
    def test_the_optimizer_still_knows_the_vectors(self, kind, tmp_path):
        model = made(kind, "hf_llama")
        model.save_pretrained(tmp_path)
        saved = run(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1.0)
        model(**inputs()).logits.sum().backward()
        state = load_file(tmp_path / "adapter_model.safetensors")
        minipeft.set_peft_model_state_dict(model, state)
        close(run(model), saved)
        optimizer.zero_grad()
        model(**inputs()).logits.sum().backward()
        optimizer.step()
        differ(run(model), saved)
