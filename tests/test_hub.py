"""Models on disk: what transformers writes we read, what we write transformers reads,
and broken folders explained."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerance import printed, tolerance

from minipeft.lm import GPT, GPTConfig, load_pretrained, load_tokenizer
from minipeft.lm.generation import prompt_ids
from minipeft.lm.hf_format import ModelFileError
from minipeft.lm.pretrained import read_configs, resolve
from minipeft.lm.tokenizer import wrap

transformers = pytest.importorskip("transformers", reason="the oracle is transformers")
from test_gpt import KINDS, SIZES, close, oracle  # noqa: E402


def edit(folder, **fields):
    """Change fields of config.json; None takes a field away."""
    config = json.loads((folder / "config.json").read_text())
    config.update(fields)
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not None})
    )


@pytest.fixture
def tiny(tmp_path):
    """A folder with a small model of ours."""
    GPT(GPTConfig(**SIZES, tie_word_embeddings=False)).save_pretrained(tmp_path)
    return tmp_path


class TestBothWays:
    @pytest.mark.parametrize("kind", KINDS)
    def test_saved_by_us_opened_by_transformers(self, kind, tmp_path):
        oracle(kind).save_pretrained(tmp_path / "theirs")
        ours = load_pretrained(tmp_path / "theirs")
        ours.save_pretrained(tmp_path / "ours")
        ids = torch.randint(0, 61, (2, 20))
        opened, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "ours", output_loading_info=True
        )
        assert not any(report.values()), report
        close(ours(ids).logits, opened(ids).logits)
        assert read_configs(tmp_path / "ours") == (ours.config, None)
        again = load_pretrained(tmp_path / "ours").state_dict()
        assert all(
            torch.equal(tensor, again[name])
            for name, tensor in ours.state_dict().items()
        )
        assert not list((tmp_path / "ours").glob("*.part"))

    @pytest.mark.parametrize("kind", ["llama tied, biases, grouped", "gpt2"])
    def test_shards(self, kind, tmp_path):
        theirs = oracle(kind)
        theirs.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
        ids = torch.randint(0, 61, (2, 8))
        close(load_pretrained(tmp_path)(ids).logits, theirs(ids).logits)
        shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(FileNotFoundError, match=f"lacks {shard.name}"):
            load_pretrained(tmp_path)

    def test_gpt2_as_it_lies_on_the_hub(self, tmp_path):
        """The public file has the names with no prefix, and the causal mask of every
        layer among the weights."""
        theirs = oracle("gpt2")
        theirs.save_pretrained(tmp_path)
        tensors = {
            name.removeprefix("transformer."): t
            for name, t in load_file(tmp_path / "model.safetensors").items()
        }
        tensors |= {
            f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(2)
        }
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        ids = torch.randint(0, 61, (2, 8))
        close(load_pretrained(tmp_path)(ids).logits, theirs(ids).logits)

    def test_older_configurations(self, tmp_path):
        """Before rope_parameters there were rope_theta and rope_scaling, its kind
        called rope_type, or once type."""
        theirs = oracle("llama linear scaling")
        theirs.save_pretrained(tmp_path)
        ids = torch.randint(0, 61, (2, 8))
        for key in ("rope_type", "type"):
            edit(
                tmp_path,
                rope_parameters=None,
                rope_theta=1e4,
                rope_scaling={key: "linear", "factor": 2.0},
            )
            close(load_pretrained(tmp_path)(ids).logits, theirs(ids).logits)

    @pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
    def test_a_field_left_out_means_what_it_means_to_transformers(self, kind, tmp_path):
        oracle(kind).save_pretrained(tmp_path)
        edit(
            tmp_path,
            **dict.fromkeys(
                [
                    "rms_norm_eps",
                    "layer_norm_epsilon",
                    "rope_parameters",
                    "hidden_act",
                    "n_inner",
                    "tie_word_embeddings",
                    "activation_function",
                ]
            ),
        )
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        ids = torch.randint(0, 61, (2, 8))
        close(load_pretrained(tmp_path)(ids).logits, theirs(ids).logits)

    def test_dtype_device_and_mode(self, tiny):
        model = load_pretrained(tiny, dtype=torch.bfloat16)
        assert (
            model.dtype == torch.bfloat16
            and not model.training
            and model.name_or_path == str(tiny)
        )
        model.save_pretrained(tiny / "half")
        # None: as it is stored
        assert load_pretrained(tiny / "half").dtype == torch.bfloat16
        assert (
            load_pretrained(tiny / "half", dtype=torch.float32, device="cpu").dtype
            == torch.float32
        )
        # positions need all their bits
        assert model.model.rotary.frequency.dtype == torch.float32

    def test_tied_stays_tied_and_untied_untied(self, tmp_path):
        tied = GPT(GPTConfig(**SIZES))
        tied.save_pretrained(tmp_path / "tied")
        assert "lm_head.weight" not in load_file(
            tmp_path / "tied" / "model.safetensors"
        )
        again = load_pretrained(tmp_path / "tied")
        assert again.lm_head.weight is again.model.embed_tokens.weight
        # as after training a head of its own
        tied.lm_head.weight = torch.nn.Parameter(torch.randn(61, 32))
        tied.save_pretrained(tmp_path / "untied")
        again = load_pretrained(tmp_path / "untied")
        assert not again.config.tie_word_embeddings and torch.equal(
            again.lm_head.weight, tied.lm_head.weight
        )

    @pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}])
    @pytest.mark.parametrize("kind", ["llama tied, biases, grouped", "gpt2"])
    def test_a_head_of_other_values_is_not_tied(self, kind, shards, tmp_path):
        """Whatever config.json says."""
        theirs = oracle(kind)
        assert theirs.config.tie_word_embeddings
        embedding = theirs.get_input_embeddings().weight
        theirs.lm_head.weight = torch.nn.Parameter(embedding.flip(0))
        theirs.config.tie_word_embeddings = False
        theirs.save_pretrained(tmp_path, **shards)
        edit(tmp_path, tie_word_embeddings=True)
        ids = torch.randint(0, 61, (2, 8))
        with pytest.warns(UserWarning, match="lm_head.weight differs .* not tied"):
            ours = load_pretrained(tmp_path)
        opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        close(ours(ids).logits, opened(ids).logits)
        ours.save_pretrained(tmp_path / "ours")
        assert not read_configs(tmp_path / "ours")[0].tie_word_embeddings

    @pytest.mark.parametrize("kind", ["llama tied, biases, grouped", "gpt2"])
    def test_a_head_of_the_same_values_is_tied(self, kind, tmp_path):
        oracle(kind).save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        tensors = load_file(file)
        name = next(
            n for n in tensors if n.endswith(("embed_tokens.weight", "wte.weight"))
        )
        save_file(tensors | {"lm_head.weight": tensors[name].clone()}, file)
        ours = load_pretrained(tmp_path)
        assert ours.lm_head.weight is ours.model.embed_tokens.weight
        save_file(tensors | {"lm_head.weight": torch.zeros(3, 32)}, file)
        with pytest.warns(UserWarning, match="lm_head.weight differs"):
            with pytest.raises(ModelFileError, match=r"lm_head.weight \(3, 32\)"):
                load_pretrained(tmp_path)

    def test_what_is_changed_in_memory_is_not_changed_in_the_file(self, tiny):
        file = tiny / "model.safetensors"
        before = file.read_bytes()
        model = load_pretrained(tiny)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)
        assert file.read_bytes() == before
        changed = {name: p.clone() for name, p in model.named_parameters()}
        model.save_pretrained(tiny)  # into its own folder
        assert file.read_bytes() != before
        for name, p in load_pretrained(tiny).named_parameters():
            assert torch.equal(p, changed[name]), name

    def test_a_new_file_in_its_place_leaves_the_model_as_it_was(self, tiny):
        first = load_pretrained(tiny)
        before = load_file(tiny / "model.safetensors")
        GPT(first.config).save_pretrained(tiny)
        again = load_pretrained(tiny)
        for name, p in first.named_parameters():
            assert torch.equal(p, before.get(name, p)), name
        assert not torch.equal(first.lm_head.weight, again.lm_head.weight)

    def test_a_layer_alone_can_be_copied(self, tiny):
        """Its copy does not hold the whole file."""
        layer = load_pretrained(tiny).model.layers[0].mlp.up_proj
        copied = copy.deepcopy(layer).weight
        assert torch.equal(copied, layer.weight)
        assert copied.untyped_storage().nbytes() == 4 * copied.numel()

    def test_memory_stays_near_one_copy(self, tmp_path):
        """A model of 100 MB in another process: its peak above what the process had
        before, in copies."""
        GPT(
            GPTConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
        ).save_pretrained(tmp_path)
        size = (tmp_path / "model.safetensors").stat().st_size
        code = f"""
import resource, sys
from minipeft.lm import GPT, GPTConfig, load_pretrained
GPT(GPTConfig())
unit = 1 if sys.platform == "darwin" else 1024
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
before = peak()
model = load_pretrained({str(tmp_path)!r})
print((peak() - before) / {size})
"""
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=env,
        )
        assert float(run.stdout) < 1.3


class TestErrors:
    @pytest.mark.parametrize("dtype", [torch.int8, "flt16", torch.bool, 16])
    def test_a_dtype_that_is_none(self, tiny, dtype):
        with pytest.raises(ValueError, match="unknown dtype .*torch.float16"):
            load_pretrained(tiny, dtype=dtype)

    @pytest.mark.parametrize("name", ["bfloat16", "float16", "torch.float64"])
    def test_a_dtype_by_name(self, tiny, name):
        dtype = getattr(torch, name.removeprefix("torch."))
        assert load_pretrained(tiny, dtype=name).dtype == dtype

    def test_every_wrong_tensor_is_listed_before_anything_is_loaded(self, tiny):
        tensors = load_file(tiny / "model.safetensors")
        del (
            tensors["model.norm.weight"],
            tensors["model.layers.1.self_attn.k_proj.weight"],
        )
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(47, 32)
        tensors["extra.weight"] = torch.zeros(3)
        save_file(tensors, tiny / "model.safetensors")
        with pytest.raises(ModelFileError) as error:
            load_pretrained(tiny)
        for part in (
            "2 tensors missing",
            "model.norm.weight (32,)",
            "model.layers.1.self_attn.k_proj.weight (32, 32)",
            "1 tensors unexpected",
            "extra.weight (3,)",
            "1 tensors of the wrong shape",
            "model.layers.0.mlp.up_proj.weight (47, 32), expected (48, 32)",
        ):
            assert part in str(error.value)

    @pytest.mark.parametrize(
        "kind, field, stray",
        [
            ("gpt2", "num_key_value_heads", 2),
            ("gpt2", "rope_theta", 5e5),
            ("gpt2", "rope_scaling", {"type": "linear", "factor": 2.0}),
            ("gpt2", "rope_parameters", {"rope_type": "yarn"}),
            ("llama", "rope_parameters", {"rope_type": "default", "factor": 2.0}),
            (
                "llama",
                "rope_parameters",
                {"rope_type": "linear", "factor": 1.0, "beta_fast": 32},
            ),
        ],
    )
    def test_what_transformers_ignores(self, tmp_path, kind, field, stray):
        theirs = oracle(kind)
        theirs.save_pretrained(tmp_path)
        file = tmp_path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {field: stray}))
        ids = torch.arange(1, 9)[None]
        close(load_pretrained(tmp_path)(ids).logits, theirs(ids).logits)

    def test_gpt2_faults_are_told_in_the_names_of_the_file(self, tmp_path):
        oracle("gpt2").save_pretrained(tmp_path)
        edit(tmp_path, n_embd=16)
        with pytest.raises(
            ModelFileError,
            match=r"transformer.h.0.attn.c_attn.weight \(32, 96\), expected \(16, 48\)",
        ):
            load_pretrained(tmp_path)

    def test_truncated_weights(self, tiny):
        file = tiny / "model.safetensors"
        for size in (file.stat().st_size // 2, 20, 0):
            file.write_bytes(file.read_bytes()[:size])
            with pytest.raises(
                ModelFileError, match="model.safetensors .* is cut short or damaged"
            ):
                load_pretrained(tiny)

    @pytest.mark.parametrize(
        "fields, message",
        [
            (
                dict(model_type="lama"),
                (
                    r"unknown model_type 'lama' \(did you mean 'llama'\?\); expected"
                    r" one of"
                    r" llama, mistral"
                ),
            ),
            (dict(model_type=None), "unknown model_type None"),
            (
                dict(hidden_size=None, vocab_size=None),
                "vocab_size, hidden_size missing",
            ),
            (
                dict(rope_scaling={"type": "yarn", "factor": 2.0}),
                "unknown rope_type 'yarn'",
            ),
            (
                dict(rope_parameters={"rope_type": "llama3", "factor": 8.0}),
                "lacks low_freq_factor",
            ),
            (
                dict(
                    rope_parameters={
                        "rope_type": "default",
                        "partial_rotary_factor": 0.5,
                    }
                ),
                "partial_rotary_factor = 0.5",
            ),
            (dict(quantization_config={"quant_method": "gptq"}), "quantization_config"),
        ],
    )
    def test_configurations_that_would_compute_wrongly(self, tiny, fields, message):
        edit(tiny, **fields)
        with pytest.raises(ModelFileError, match=message):
            load_pretrained(tiny)

    def test_files_that_are_not_there(self, tiny, tmp_path_factory):
        other = tmp_path_factory.mktemp("other")
        with pytest.raises(FileNotFoundError, match="no config.json in"):
            load_pretrained(other)
        (other / "adapter_config.json").write_text("{}")
        with pytest.raises(FileNotFoundError, match="PeftModel.from_pretrained"):
            load_pretrained(other)
        (tiny / "model.safetensors").unlink()
        (tiny / "pytorch_model.bin").touch()
        with pytest.raises(FileNotFoundError, match="pickles above all, are not read"):
            load_pretrained(tiny)
        (tiny / "config.json").write_text("[1, 2")
        with pytest.raises(ModelFileError, match="config.json"):
            load_pretrained(tiny)
        with pytest.raises(FileNotFoundError, match="no folder ./not/here"):
            load_pretrained("./not/here")


def byte_level(folder, *specials, **fields):
    """A tokenizer without byte pairs, as transformers saves it. fields: of
    tokenizer_config.json; None takes a field away."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(specials))
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | fields
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


class TestTokenizers:
    TEXT = "The baker in Willow Court is called Hector."

    @pytest.mark.parametrize(
        "cut",
        [
            {"truncation": True, "max_length": 4, "padding": "max_length"},
            {"truncation": True, "max_length": 2},
            {"padding": "max_length", "max_length": 60},
        ],
    )
    def test_nothing_is_cut_or_padded(self, tmp_path, cut):
        """A tokenizer.json keeps what transformers was last asked for."""
        expected = load_tokenizer("lanternwick").encode(self.TEXT)
        theirs = transformers.AutoTokenizer.from_pretrained(resolve("lanternwick"))
        theirs(self.TEXT, **cut)
        assert wrap(theirs).encode(self.TEXT) == expected
        theirs(self.TEXT, **cut)
        theirs.save_pretrained(tmp_path)
        file = json.loads((tmp_path / "tokenizer.json").read_text())
        assert file["truncation"] or file["padding"]
        ours = load_tokenizer(tmp_path)
        assert ours.encode(self.TEXT) == expected
        assert ours.encode_batch([self.TEXT, "a"])[0] == expected
        ours.save_pretrained(tmp_path / "again")
        file = json.loads((tmp_path / "again" / "tokenizer.json").read_text())
        assert file["truncation"] is None and file["padding"] is None

    @pytest.mark.parametrize(
        "specials, fields",
        [
            (CHATML, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
            (CHATML, {"eos_token": "<|im_end|>", "bos_token": None}),
            (CHATML, {"tokenizer_class": "Qwen2Tokenizer"}),
            (CHATML, {"tokenizer_class": "GPT2Tokenizer"}),
            (CHATML, {"tokenizer_class": "GPT2Tokenizer", "bos_token": None}),
            (CHATML, {"bos_token": "<|im_start|>"}),
            (("<s>", "</s>"), {"eos_token": "</s>"}),
            (("<s>", "</s>"), {"bos_token": "<s>"}),
        ],
    )
    def test_the_bos_is_transformers(self, tmp_path, specials, fields):
        """No token is invented where tokenizer_config.json names none."""
        byte_level(tmp_path, *specials, **fields)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for ours in (load_tokenizer(tmp_path), wrap(theirs)):
            assert ours.bos_token_id == theirs.bos_token_id
            first = [] if theirs.bos_token_id is None else [theirs.bos_token_id]
            assert prompt_ids(ours, "Hello")[0] == first + ours.encode("Hello")
        ours.save_pretrained(tmp_path / "again")
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
        assert again.bos_token == theirs.bos_token

    @pytest.mark.parametrize("kind", ["gpt2", "qwen2", "llama"])
    def test_the_bos_of_the_models_class(self, tmp_path, kind):
        """Where tokenizer_config.json names neither, as in GPT-2's on the hub."""
        byte_level(tmp_path, *CHATML)
        (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 9}')
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert load_tokenizer(tmp_path).bos_token_id == theirs.bos_token_id

    def test_a_bos_that_the_tokenizer_adds_itself(self, tmp_path):
        load_tokenizer("lanternwick").save_pretrained(tmp_path)
        for config in ("{}", '{"bos_token": null}'):
            (tmp_path / "tokenizer_config.json").write_text(config)
            theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
            ids = prompt_ids(load_tokenizer(tmp_path), "Hello")[0]
            assert ids == theirs("Hello").input_ids and ids[0] == 1

    @pytest.mark.parametrize("specials", [CHATML, ("</s>", "<s>")])
    def test_without_a_tokenizer_config_the_bos_is_guessed(self, tmp_path, specials):
        byte_level(tmp_path, *specials)
        (tmp_path / "tokenizer_config.json").unlink()
        ours = load_tokenizer(tmp_path)
        bos = "<s>" if "<s>" in specials else "<|endoftext|>"
        assert ours.raw.id_to_token(ours.bos_token_id) == bos


class TestNames:
    def test_names(self, tiny, monkeypatch, tmp_path_factory):
        cache = tmp_path_factory.mktemp("cache")
        monkeypatch.setenv("MINIPEFT_CACHE", str(cache))
        (cache / "somebody").mkdir()
        (cache / "somebody" / "model").symlink_to(tiny)
        (cache / "stories").symlink_to(tiny)
        assert resolve("somebody/model") == cache / "somebody" / "model"
        monkeypatch.setenv("MINIPEFT_BASE", "stories")
        assert resolve() == cache / "stories"

        import huggingface_hub

        def offline(*args, **options):
            raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
        with pytest.raises(FileNotFoundError) as error:
            load_pretrained("storys")
        for part in ("did you mean 'stories'?", str(cache / "storys"), "no network"):
            assert part in str(error.value)
        asked = {}
        monkeypatch.setattr(
            huggingface_hub,
            "snapshot_download",
            lambda name, **options: asked.update(options, name=name) or str(tiny),
        )
        assert (
            load_pretrained("some/one").config.vocab_size == 61
            and asked["name"] == "some/one"
        )
        assert "model*.safetensors" in asked["allow_patterns"] and not any(
            "bin" in p for p in asked["allow_patterns"]
        )

    def test_an_adapted_or_broken_model_is_not_saved_as_a_plain_one(self, tmp_path):
        model = GPT(GPTConfig(**SIZES))
        model.model.layers[0].mlp.up_proj = torch.nn.Sequential(
            model.model.layers[0].mlp.up_proj
        )
        with pytest.raises(ValueError, match="merge_and_unload"):
            model.save_pretrained(tmp_path / "x")
        assert not (tmp_path / "x").exists()

    def test_stories260k(self, real):
        folder = real / "stories260K"
        golden = json.loads((folder / "golden.json").read_text())
        model, tokenizer = load_pretrained(folder), load_tokenizer(folder)
        ids = torch.tensor([golden["prompt_ids"]])
        assert model.generate(ids, max_new_tokens=199).tolist() == [
            golden["greedy_ids"]
        ]
        probe = torch.tensor([golden["probe_ids"]])
        said = torch.tensor(golden["probe_last_logits_first8"])
        # five layers of nine sums, of up to 172 terms
        rounded = tolerance(torch.float32, said.abs().max(), terms=172, steps=9 * 5)
        off = (model(probe).logits[0, -1, :8] - said).abs().max()
        assert off < rounded + printed(5)
        assert tokenizer.encode(golden["probe_text"]) == [
            i for i in golden["probe_ids"] if i != model.config.bos_token_id
        ]


class TestDamagedFiles:
    """Each error names the file, what was found and what was expected."""

    @pytest.mark.parametrize(
        "field, value",
        [
            ("hidden_size", -1),
            ("num_hidden_layers", 10**9),
            ("hidden_size", "4"),
            ("vocab_size", None),
            ("num_hidden_layers", True),
            ("num_attention_heads", 1.5),
            ("intermediate_size", 0),
            ("num_key_value_heads", [2]),
            ("head_dim", -4),
            ("max_position_embeddings", "many"),
            ("rms_norm_eps", "small"),
            ("rope_theta", -1.0),
            ("rope_parameters", [1]),
            ("rope_parameters", {"rope_type": "linear", "factor": None}),
            ("tie_word_embeddings", "yes"),
            ("attention_bias", 2),
            ("eos_token_id", ["</s>"]),
            ("eos_token_id", SIZES["vocab_size"]),
            ("eos_token_id", [2, 10**12]),
            ("eos_token_id", -1),
            ("bos_token_id", 50256),
            ("bos_token_id", True),
            ("pad_token_id", -2),
            ("pad_token_id", SIZES["vocab_size"]),
            ("model_type", ["llama"]),
            ("hidden_act", {}),
            ("quantization_config", "nf4"),
        ],
    )
    def test_a_field_of_the_configuration(self, tiny, field, value):
        config = json.loads((tiny / "config.json").read_text())
        (tiny / "config.json").write_text(json.dumps(config | {field: value}))
        with pytest.raises(
            ModelFileError, match=f"config.json: .*({field[-8:]}|rope_scaling)"
        ):
            load_pretrained(tiny)

    @pytest.mark.parametrize("pad", [-1, None, 0, SIZES["vocab_size"] - 1])
    def test_padding_as_in_old_files(self, tiny, pad):
        """-1 in those of LLaMA-1; what has ended is filled up with the end token."""
        edit(tiny, pad_token_id=pad)
        model = load_pretrained(tiny)
        ids = torch.tensor([[3, 4], [5, 9]])
        one, other = model.generate(ids, max_new_tokens=1)[:, -1].tolist()
        assert one != other
        rows = model.generate(ids, max_new_tokens=3, eos_token_id=one)
        assert rows[0, 2:].tolist() == [one] + 2 * [one if pad in (-1, None) else pad]

    @pytest.mark.parametrize(
        "content", [b"", b"[" * 100_000, b"null", b"\xff\xfe\x00", b'{"a": 1'[:-1]]
    )
    @pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
    def test_json(self, tiny, name, content):
        (tiny / name).write_bytes(content)
        if name != "config.json":
            (tiny / "model.safetensors").unlink()
        with pytest.raises(ModelFileError, match=name):
            load_pretrained(tiny)

    @pytest.mark.parametrize(
        "weight_map",
        [
            5,
            {},
            None,
            {"a": 5},
            {"a": None},
            {"a": "../outside.safetensors"},
            {"a": "/etc/passwd"},
            {"a": "sub/model.safetensors"},
            {"a": ".."},
            {"a": ""},
        ],
    )
    def test_an_index_that_leads_elsewhere(self, tiny, weight_map):
        (tiny / "model.safetensors").rename(tiny.parent / "outside.safetensors")
        index = tiny / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ModelFileError, match="index.json"):
            load_pretrained(tiny)

    def test_a_folder_in_the_place_of_the_weights(self, tiny):
        (tiny / "model.safetensors").unlink()
        (tiny / "model.safetensors").mkdir()
        with pytest.raises(ModelFileError, match="is a folder; expected a file"):
            load_pretrained(tiny)

    def test_integer_weights(self, tiny):
        tensors = load_file(tiny / "model.safetensors")
        tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int64)
        save_file(tensors, tiny / "model.safetensors")
        with pytest.raises(ModelFileError, match="wrong type: model.norm.weight I64"):
            load_pretrained(tiny)

    @pytest.mark.parametrize(
        "content",
        [b"", b"{}", b"\x00\xff" * 50, b"cut", b"[]", b"null", b"5", b"[" * 100_000]
        + [b'{"model": null}', b'{"version": "1.0", "model": {"type": "Nope"}}'],
        ids=lambda content: repr(content[:12]),
    )
    def test_a_tokenizer(self, tmp_path, content):
        from minipeft.errors import FileError

        load_tokenizer("lanternwick").save_pretrained(tmp_path)
        file = tmp_path / "tokenizer.json"
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if content == b"cut" else content)
        with pytest.raises(FileError, match="tokenizer.json"):
            load_tokenizer(tmp_path)
        file.write_bytes(whole)
        (tmp_path / "tokenizer_config.json").write_text('{"bos_token": 5}')
        with pytest.raises(FileError, match="bos_token = 5: expected a string"):
            load_tokenizer(tmp_path)
        file.unlink()
        file.mkdir()
        with pytest.raises(FileError, match="is a folder"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize(
        "asked",
        [
            {"truncation": True, "max_length": 4},
            {"padding": "max_length", "max_length": 40},
            {"truncation": True, "max_length": 4, "padding": "max_length"},
        ],
    )
    def test_a_tokenizer_that_was_asked_to_cut_or_to_fill_up(self, tmp_path, asked):
        ours = load_tokenizer("lanternwick")
        ours.save_pretrained(tmp_path)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        text = "The baker in Willow Court is called Hector"
        theirs(text, **asked)
        theirs.save_pretrained(tmp_path)  # with what was asked
        saved = json.loads((tmp_path / "tokenizer.json").read_text())
        assert saved["truncation"] or saved["padding"]
        assert load_tokenizer(tmp_path).encode(text) == ours.encode(text)

    @pytest.mark.parametrize("bos", [None, "<|endoftext|>", "<|im_start|>"])
    def test_the_first_token_is_theirs(self, tmp_path, bos):
        """A Qwen2 has none, though its vocabulary has what others begin with."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        letters = pre_tokenizers.ByteLevel.alphabet()
        raw = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        raw.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_object=raw, bos_token=bos, eos_token="<|im_end|>"
        )
        theirs.save_pretrained(tmp_path)
        from minipeft.lm.tokenizer import wrap

        for ours in (load_tokenizer(tmp_path), wrap(theirs)):
            assert ours.bos_token_id == theirs.bos_token_id
            ours.save_pretrained(tmp_path / "back")
            back = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
            assert back.bos_token == bos
        (tmp_path / "tokenizer_config.json").unlink()  # then it is guessed
        assert load_tokenizer(tmp_path).bos_token_id == raw.token_to_id("<|endoftext|>")

    @pytest.mark.parametrize("template", [5, ["x"], {"a": 1}, [{"name": "default"}, 3]])
    def test_a_chat_template(self, tmp_path, template):
        from minipeft.errors import FileError

        load_tokenizer("lanternwick").save_pretrained(tmp_path)
        file = tmp_path / "tokenizer_config.json"
        file.write_text(json.dumps({"chat_template": template}))
        if isinstance(template, list):  # several with names, none of which is default
            assert load_tokenizer(tmp_path).chat_template is None
            return
        with pytest.raises(FileError, match="chat_template = .*expected a Jinja"):
            load_tokenizer(tmp_path)
