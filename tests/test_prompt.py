"""Prompt tuning: how a prompt starts, and what it is."""

import json

import peft
import pytest
import torch
from bases import BASES, close, inputs, run

import minipeft
from minipeft import PeftModel, PromptTuningConfig, get_peft_model
from minipeft.lm import load_tokenizer


class Letters:
    """A tokenizer: a = 10, b = 11, ..."""

    name_or_path = "letters"

    def encode(self, text):
        return [ord(c) - 87 for c in text]


def words(**fields):
    return PromptTuningConfig(
        prompt_tuning_init="TEXT", tokenizer_name_or_path=Letters(), **fields
    )


class TestStart:
    @pytest.mark.parametrize("base", ["llama", "hf_llama"])
    def test_a_prompt_of_words_equals_the_words(self, base):
        model = get_peft_model(
            BASES[base].make(),
            words(num_virtual_tokens=3, prompt_tuning_init_text="cat"),
        )
        text = torch.cat((torch.tensor([[12, 10, 29]] * 3), inputs()["input_ids"]), 1)
        with torch.no_grad():
            close(model(**inputs()).logits, BASES[base].make()(input_ids=text).logits)

    def test_a_short_text_is_repeated_and_a_long_one_refused(self):
        embed = BASES["llama"].make().get_input_embeddings().weight
        model = get_peft_model(
            BASES["llama"].make(),
            words(num_virtual_tokens=5, prompt_tuning_init_text="ab"),
        )
        assert torch.equal(
            model.base_model.adapters["default"].prompt_embeddings,
            embed[[10, 11, 10, 11, 10]],
        )
        plain = BASES["llama"].make()
        with pytest.raises(
            minipeft.ConfigError,
            match="4 tokens, which do not fit into 3.*num_virtual_tokens = 4",
        ):
            get_peft_model(
                plain, words(num_virtual_tokens=3, prompt_tuning_init_text="abcd")
            )
        assert all(p.requires_grad for p in plain.parameters())
        for fields in (
            dict(prompt_tuning_init_text="a"),
            dict(tokenizer_name_or_path="x"),
            {},
        ):
            with pytest.raises(minipeft.ConfigError, match="TEXT.*needs"):
                PromptTuningConfig(
                    num_virtual_tokens=3, prompt_tuning_init="TEXT", **fields
                )
        with pytest.raises(
            minipeft.ConfigError,
            match="'WORDS'; expected one of RANDOM, SAMPLE_VOCAB, TEXT",
        ):
            PromptTuningConfig(num_virtual_tokens=3, prompt_tuning_init="WORDS")

    def test_a_named_tokenizer_as_in_peft(self, tmp_path):
        from transformers import LlamaConfig, LlamaForCausalLM

        tokenizer = load_tokenizer("lanternwick")
        tokenizer.save_pretrained(tmp_path)
        torch.manual_seed(0)
        base = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                num_hidden_layers=1,
                intermediate_size=24,
                num_attention_heads=4,
            )
        )
        fields = dict(
            num_virtual_tokens=9,
            task_type="CAUSAL_LM",
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text="Write SQL:",
            tokenizer_name_or_path=str(tmp_path),
        )
        theirs = (
            peft.get_peft_model(base, peft.PromptTuningConfig(**fields))
            .prompt_encoder["default"]
            .embedding.weight
        )
        ours = (
            get_peft_model(base, PromptTuningConfig(**fields))
            .base_model.adapters["default"]
            .prompt_embeddings
        )
        assert torch.equal(ours, theirs)

    def test_sampled_words_are_words(self):
        embed = BASES["llama"].make().get_input_embeddings().weight
        config = PromptTuningConfig(
            num_virtual_tokens=6, prompt_tuning_init="SAMPLE_VOCAB"
        )
        prompt = (
            get_peft_model(BASES["llama"].make(), config)
            .base_model.adapters["default"]
            .prompt_embeddings
        )
        assert all(
            any(torch.equal(vector, word) for word in embed) for vector in prompt
        )
        assert len(prompt.unique(dim=0)) > 1


class TestTraining:
    def test_only_the_prompt_is_trained(self):
        torch.manual_seed(0)
        model = get_peft_model(
            BASES["llama"].make(), PromptTuningConfig(num_virtual_tokens=4)
        )
        ids = inputs()["input_ids"]
        optimizer = torch.optim.Adam(
            [p for p in model.parameters() if p.requires_grad], lr=0.1
        )
        losses = []
        for _ in range(30):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.5
        with model.disable_adapter():
            assert torch.equal(run(model), run(BASES["llama"].make()))


class TestSaving:
    def test_a_saved_prompt_no_longer_needs_its_text(self, tmp_path):
        model = get_peft_model(
            BASES["llama"].make(),
            words(num_virtual_tokens=3, prompt_tuning_init_text="cat"),
        )
        model.save_pretrained(tmp_path)
        assert (
            json.loads((tmp_path / "adapter_config.json").read_text())[
                "tokenizer_name_or_path"
            ]
            == "letters"
        )
        for trainable in (False, True):
            again = PeftModel.from_pretrained(
                BASES["llama"].make(), tmp_path, is_trainable=trainable
            )
            assert torch.equal(run(again), run(model))
