"""4-bit models from and to Hugging Face's folders: as they are read, with little
memory, and with transformers."""

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from bases import close
from safetensors.torch import load_file, save_file
from torch import nn

from minipeft import LoraConfig, get_peft_model
from minipeft.lm import GPT, GPTConfig, load_pretrained, save_pretrained
from minipeft.lm.hf_format import ModelFileError
from minipeft.quant import quantize_model
from minipeft.quant.bitsandbytes import as_bytes
from minipeft.slot import Slot
from minipeft.weights import is_dense, is_linear, logical_numel, read_weight

IDS = torch.arange(12).view(2, 6)


def gpt(**fields):
    torch.manual_seed(0)
    return GPT(
        GPTConfig(
            **(
                dict(
                    vocab_size=64,
                    hidden_size=64,
                    intermediate_size=128,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    attention_bias=True,
                    initializer_range=0.2,
                )
                | fields
            )
        )
    ).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


class TestLoading:
    @pytest.mark.parametrize("backend", ["torch", "bitsandbytes"])
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            dict(tie_word_embeddings=False),
            dict(model_type="gpt2", hidden_act="gelu_new", num_key_value_heads=4),
        ],
    )
    def test_loading_into_4_bits_is_loading_and_then_quantising(
        self, fields, backend, tmp_path
    ):
        save_pretrained(gpt(**fields), tmp_path)
        kind = dict(
            bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, backend=backend
        )
        model = load_pretrained(tmp_path, quantization=kind)
        expected = quantize_model(load_pretrained(tmp_path), backend)
        assert torch.equal(logits(model), logits(expected))
        assert sum(type(m).__name__ == "Linear4bit" for m in model.modules()) >= 12
        assert not any(p.is_meta for p in model.parameters())
        assert sum(map(logical_numel, model.parameters())) == sum(
            p.numel() for p in load_pretrained(tmp_path).parameters()
        )

    def test_names_dicts_and_configurations(self, tmp_path):
        save_pretrained(gpt(), tmp_path)
        import transformers

        theirs = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
        assert torch.equal(
            logits(load_pretrained(tmp_path, quantization="nf4")),
            logits(load_pretrained(tmp_path, quantization=theirs)),
        )
        layer = (
            load_pretrained(
                tmp_path, quantization=dict(bnb_4bit_quant_type="fp4", block_size=128)
            )
            .model.layers[0]
            .mlp.up_proj
        )
        assert (layer.quant_type, layer.block_size, layer.double_quant) == (
            "fp4",
            128,
            False,
        )
        model = load_pretrained(
            tmp_path,
            dtype=torch.bfloat16,
            quantization=dict(llm_int8_skip_modules=["q_proj", "lm_head"]),
        )
        assert (
            type(model.model.layers[0].self_attn.q_proj) is nn.Linear
            and model.dtype == torch.bfloat16
        )
        with pytest.raises(ValueError, match="only 4 bits"):
            load_pretrained(tmp_path, quantization=dict(load_in_8bit=True))


@pytest.mark.parametrize("backend", ["torch", "bitsandbytes"])
@pytest.mark.parametrize("what", ["quantised", "adapted and merged"])
def test_a_layer_that_was_replaced_is_freed_at_once(what, backend):
    """Not when the garbage collector comes by: until then a large model would be in
    memory twice."""
    quantize_model(gpt(), backend)  # all that is imported or made once
    model = gpt()
    if what == "adapted and merged":
        model = get_peft_model(quantize_model(model, backend), LoraConfig(r=2))
    layers = [m for m in model.modules() if type(m) in (Slot, nn.Linear)]
    layers = [weakref.ref(layer) for layer in layers if layer is not model.lm_head]
    gc.collect()
    gc.disable()
    try:
        if what == "quantised":
            quantize_model(model, backend)
        else:
            model.unload()
        assert layers and not any(layer() for layer in layers)
    finally:
        gc.enable()


PEAK = """
import sys, threading, time, torch
from minipeft.lm import load_pretrained
torch.set_num_threads(1)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def load(folder):
    nf4 = dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return load_pretrained(folder, quantization=nf4 | dict(backend=sys.argv[2]))
load(sys.argv[1] + "/small")  # all that is imported or made once
before, seen = resident(), []
def watch():
    while True:
        seen.append(resident())
        time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
model = load(sys.argv[1] + "/large")
print(max(seen) - before)
"""


class TestSaving:
    @pytest.mark.parametrize("double_quant", [True, False])
    def test_saved_and_loaded_again(self, double_quant, tmp_path):
        model = quantize_model(
            gpt(tie_word_embeddings=False),
            double_quant=double_quant,
            compute_dtype=torch.float32,
        )
        save_pretrained(model, tmp_path)
        again = load_pretrained(tmp_path)
        assert torch.equal(logits(again), logits(model))
        state, other = model.state_dict(), again.state_dict()
        assert state.keys() == other.keys() and all(
            torch.equal(state[key], other[key]) for key in state
        )
        assert again.model.layers[1].mlp.down_proj.compute_dtype == torch.float32
        size = (tmp_path / "model.safetensors").stat().st_size
        save_pretrained(gpt(tie_word_embeddings=False), tmp_path / "dense")
        assert size < 0.6 * (tmp_path / "dense" / "model.safetensors").stat().st_size
        with pytest.raises(ValueError, match="in 4 bits already"):
            load_pretrained(tmp_path, quantization="nf4")

    @pytest.mark.parametrize("backend", ["torch", "bitsandbytes"])
    def test_transformers_opens_what_is_saved_in_4_bits(self, backend, tmp_path):
        import transformers

        model = quantize_model(
            gpt(tie_word_embeddings=False), backend, compute_dtype=torch.float32
        )
        save_pretrained(model, tmp_path)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        layer = theirs.model.layers[0].mlp.down_proj
        assert type(layer).__module__.startswith("bitsandbytes")
        assert torch.equal(
            read_weight(layer), read_weight(model.model.layers[0].mlp.down_proj)
        )
        for module in theirs.modules():
            module.support_avx512bf16_for_cpu = False
        close(logits(theirs), logits(model))

    def test_we_open_what_transformers_saves_in_4_bits(self, tmp_path):
        import transformers

        save_pretrained(gpt(tie_word_embeddings=False), tmp_path / "dense")
        how = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=how
        )
        theirs.save_pretrained(tmp_path / "four")
        model = load_pretrained(tmp_path / "four")
        assert torch.equal(
            logits(model),
            logits(load_pretrained(tmp_path / "dense", quantization="nf4")),
        )

    @pytest.mark.parametrize(
        "fields",
        [
            {"bnb_4bit_quant_storage": torch.bfloat16},
            {"bnb_4bit_quant_storage": torch.float32},
            {"llm_int8_skip_modules": []},
            {"llm_int8_skip_modules": ["model.layers.0.mlp", "lm_head"]},
            {"llm_int8_skip_modules": ["q_proj", "model.layers.1"]},
        ],
        ids=lambda fields: str(*fields.values()),
    )
    def test_what_else_transformers_writes(self, fields, tmp_path):
        import transformers

        save_pretrained(gpt(tie_word_embeddings=False), tmp_path / "dense")
        how = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", **fields
        )
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=how
        )
        theirs.save_pretrained(tmp_path / "four")
        ours = load_pretrained(tmp_path / "four")
        for path, layer in theirs.named_modules():
            if is_linear(layer):
                found = ours.get_submodule(path)
                assert is_dense(found) == is_dense(layer), path
                assert torch.equal(read_weight(found), read_weight(layer)), path
        save_pretrained(ours, tmp_path / "again")
        assert torch.equal(logits(load_pretrained(tmp_path / "again")), logits(ours))

    @pytest.mark.parametrize("dtype", ["float99", "int8", "load", 5, True])
    def test_a_wrong_compute_dtype(self, dtype, tmp_path):
        save_pretrained(quantize_model(gpt()), tmp_path)
        file = tmp_path / "config.json"
        config = json.loads(file.read_text())
        config["quantization_config"]["bnb_4bit_compute_dtype"] = dtype
        file.write_text(json.dumps(config))
        with pytest.raises(
            ModelFileError, match=f"unknown bnb_4bit_compute_dtype '{dtype}'.*float32"
        ):
            load_pretrained(tmp_path)

    @pytest.mark.parametrize("size", [64.0, 0, "64", True])
    def test_a_wrong_block_size(self, size, tmp_path):
        save_pretrained(quantize_model(gpt()), tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        name = next(name for name in tensors if "quant_state" in name)
        state = json.loads(bytes(tensors[name].tolist()))
        tensors[name] = as_bytes(state | {"blocksize": size})
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ModelFileError, match="blocksize = .*a whole number at"):
            load_pretrained(tmp_path)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
    def test_a_packed_weight_of_a_wrong_type(self, dtype, tmp_path):
        save_pretrained(quantize_model(gpt()), tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].view(dtype)
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ModelFileError, match=f"wrong type: {name} .* one of U8"):
            load_pretrained(tmp_path)

    def test_what_cannot_be_read_or_written(self, tmp_path):
        with pytest.raises(ValueError, match="joins q, k and v"):
            save_pretrained(
                quantize_model(
                    gpt(model_type="gpt2", hidden_act="gelu_new", num_key_value_heads=4)
                ),
                tmp_path,
            )
        save_pretrained(gpt(), tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(
            json.dumps(config | {"quantization_config": {"load_in_4bit": True}})
        )
        with pytest.raises(ModelFileError, match="wrong shape: .*q_proj.weight"):
            load_pretrained(tmp_path)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize(
        "double_quant, part",
        [(True, "nested_absmax"), (True, "nested_offset"), (False, "absmax")],
    )
    def test_scales_that_are_not_finite(self, double_quant, part, bad, tmp_path):
        save_pretrained(quantize_model(gpt(), double_quant=double_quant), tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        key = "model.layers.1.mlp.up_proj.weight"
        if part == "nested_offset":
            name = f"{key}.quant_state.bitsandbytes__nf4"
            state = json.loads(bytes(tensors[name].tolist()))
            tensors[name] = as_bytes(state | {part: bad})
        else:
            tensors[f"{key}.{part}"][0] = bad
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ModelFileError, match=f"{key}: NaN or infinity among the"):
            load_pretrained(tmp_path)

    @pytest.mark.skipif(
        not Path("/proc/self/statm").exists(), reason="memory is measured on Linux only"
    )
    @pytest.mark.parametrize("backend", ["torch", "bitsandbytes"])
    def test_peak_memory_is_near_the_4_bit_size_and_one_tensor(self, backend, tmp_path):
        save_pretrained(gpt(), tmp_path / "small")
        large = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=3)
        save_pretrained(gpt(**large), tmp_path / "large")
        dense = (tmp_path / "large" / "model.safetensors").stat().st_size
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(tmp_path), backend],
            capture_output=True,
            text=True,
            # what is freed is given back at once
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "200000"},
        )
        assert done.returncode == 0, done.stderr
        peak, largest = int(done.stdout.splitlines()[-1]), 1024 * 2816 * 4
        four_bit = dense / 32 * 4.5
        assert peak < four_bit + 4 * largest < 0.5 * dense, (
            f"{peak / 1e6:.0f} MB; in 4 bits it has {four_bit / 1e6:.0f} MB"
        )
