"""transformers.Trainer and accelerate loops with a minipeft model, against the same run
with Hugging Face PEFT.

Both start from one adapter file, take the same batches, and must log the same losses.
"""

import copy
import importlib.util
import json
from pathlib import Path

import huggingface_hub
import peft
import pytest
import torch
import transformers
from bases import BASES
from safetensors.torch import load_file
from tolerance import assert_within

import minipeft
from minipeft import AdapterNameError, PeftModel

TEXTS = [
    dict(
        input_ids=(ids := torch.randint(3, 40, (6,), generator=torch.manual_seed(i))),
        attention_mask=torch.ones(6, dtype=torch.long),
        labels=ids,
        line_number=i,  # a column that no model knows: Trainer has to drop it
    )
    for i in range(12)
]
METHODS = {
    "lora": lambda base: peft.LoraConfig(r=4, target_modules=list(base.targets)),
    "dora": lambda base: peft.LoraConfig(
        r=4, target_modules=list(base.targets), use_dora=True
    ),
    "ia3": lambda base: peft.IA3Config(
        target_modules=list(base.targets), feedforward_modules=[base.targets[-1]]
    ),
    "prompt": lambda base: peft.PromptTuningConfig(
        num_virtual_tokens=3, task_type="CAUSAL_LM"
    ),
    "prefix": lambda base: peft.PrefixTuningConfig(
        num_virtual_tokens=3, task_type="CAUSAL_LM"
    ),
}


def pair(tmp_path, base="hf_llama", method="lora", make=None):
    """(our model, PEFT's), with the same new adapter."""
    make = make or BASES[base].make
    torch.manual_seed(0)
    config = (METHODS | MORE_METHODS)[method](BASES[base])
    theirs = peft.get_peft_model(make(), config).train()
    theirs.save_pretrained(tmp_path / "start")
    ours = PeftModel.from_pretrained(make(), tmp_path / "start", is_trainable=True)
    return ours.train(), theirs


def trainer(model, folder, **more):
    """A Trainer that logs each step, and evaluates and saves each second one."""
    options = dict(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**options | more),
        train_dataset=TEXTS[:8],
        eval_dataset=TEXTS[8:],
    )


def losses(run):
    """What a Trainer has logged, of training and evaluation."""
    history = run.state.log_history
    train = [entry["loss"] for entry in history if "loss" in entry]
    evaluation = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return torch.tensor(train + evaluation)


def assert_same_losses(ours, theirs):
    """A loss is a mean over tokens, in which the errors of single sums cancel: what
    counts are nine results in each of two layers, forth and back, over four steps."""
    assert_within(ours, theirs, steps=2 * 9 * 4)


def weights(model):
    """The trained parameters, one vector."""
    trained = [p.detach().float() for p in model.parameters() if p.requires_grad]
    return torch.cat([p.flatten() for p in trained])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TEXTS[0]["input_ids"][None]).logits


def train_both(tmp_path, models, **options):
    runs = []
    for name, model in zip(("ours", "theirs"), models):
        run = trainer(model, tmp_path / name, **options)
        run.train()
        runs.append(run)
    return runs


class TestTraining:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("base", ["hf_llama", "hf_gpt2"])
    def test_losses_equal_those_of_peft(self, base, method, tmp_path):
        models = pair(tmp_path, base, method)
        start = weights(models[0])
        ours, theirs = map(losses, train_both(tmp_path, models))
        assert len(ours) == len(theirs) == 6
        assert_same_losses(ours, theirs)
        assert (weights(models[0]) - start).abs().max() > 1e-3

    @pytest.mark.parametrize(
        "options",
        [
            dict(gradient_accumulation_steps=2),
            dict(gradient_checkpointing=True),
            dict(
                gradient_checkpointing=True,
                gradient_checkpointing_kwargs={"use_reentrant": True},
            ),
            dict(label_smoothing_factor=0.1),
        ],
        ids=["accumulation", "checkpointing", "reentrant", "label smoothing"],
    )
    def test_options(self, options, tmp_path):
        ours, theirs = train_both(tmp_path, pair(tmp_path), **options)
        assert_same_losses(losses(ours), losses(theirs))

    def test_bf16(self, tmp_path):
        """Two layers of about nine roundings to bfloat16 each."""
        ours, theirs = train_both(tmp_path, pair(tmp_path), bf16=True)
        assert_within(losses(ours), losses(theirs), steps=18, dtype=torch.bfloat16)


MORE_METHODS = {
    "p-tuning": lambda base: peft.PromptEncoderConfig(
        num_virtual_tokens=3, task_type="CAUSAL_LM", encoder_hidden_size=8
    ),
    "projected prefix": lambda base: peft.PrefixTuningConfig(
        num_virtual_tokens=3,
        task_type="CAUSAL_LM",
        prefix_projection=True,
        encoder_hidden_size=8,
    ),
    "vera": lambda base: peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "loha": lambda base: peft.LoHaConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "adalora": lambda base: peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, target_modules=["q_proj", "v_proj"]
    ),
    "whole head": lambda base: peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]
    ),
    "embeddings": lambda base: peft.LoraConfig(
        r=4, target_modules=["q_proj", "embed_tokens"]
    ),
}


class TestCheckpoints:
    @pytest.mark.parametrize("method", ["lora", "prompt"])
    def test_a_checkpoint_holds_the_adapter_alone(self, method, tmp_path):
        ours, theirs = pair(tmp_path, "hf_gpt2", method)  # tied
        train_both(tmp_path, (ours, theirs))
        own, other = (tmp_path / name / "checkpoint-4" for name in ("ours", "theirs"))
        assert {f.name for f in own.iterdir()} == {f.name for f in other.iterdir()}
        own, other = (load_file(f / "adapter_model.safetensors") for f in (own, other))
        assert own.keys() == other.keys()
        for name in own:
            assert_within(own[name], other[name], terms=16, steps=9 * 2 * 4)

    @pytest.mark.parametrize("method", ["lora", "prefix", *MORE_METHODS])
    def test_resume(self, method, tmp_path):
        """To the same bits; PEFT cannot where an encoder is not in its files."""
        model, _ = pair(tmp_path, method=method)
        start = copy.deepcopy(model)
        whole = trainer(model, tmp_path / "run")
        whole.train()
        resumed = trainer(start, tmp_path / "run")
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        assert torch.equal(weights(start), weights(model))
        assert torch.equal(losses(resumed), losses(whole))

    @pytest.mark.parametrize("method", ["prompt", "ia3", *MORE_METHODS])
    def test_the_best_model_of_any_method(self, method, tmp_path):
        model, _ = pair(tmp_path, method=method)
        run = trainer(model, tmp_path / "run", load_best_model_at_end=True)
        run.train()
        assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric)
        best = run.state.best_model_checkpoint
        again = PeftModel.from_pretrained(BASES["hf_llama"].make(), best)
        assert torch.equal(logits(again), logits(model))

    def test_the_best_model_is_loaded_at_the_end(self, tmp_path):
        """Not the last: at this rate the loss rises after the second step."""
        model, _ = pair(tmp_path)
        run = trainer(model, tmp_path / "run", load_best_model_at_end=True)
        run.train()
        best = Path(run.state.best_model_checkpoint)
        assert best.name == "checkpoint-2"
        again = PeftModel.from_pretrained(
            BASES["hf_llama"].make(), best, is_trainable=True
        )
        assert torch.equal(weights(model), weights(again))
        assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric)

    def test_loading_into_an_adapter(self, tmp_path):
        """Its parameters stay, so that the optimizer still knows them."""
        model, theirs = pair(tmp_path)
        parameters = [p for p in model.parameters() if p.requires_grad]
        before = weights(model)
        with torch.no_grad():
            for parameter in parameters:
                parameter += 1
        model.load_adapter(tmp_path / "start", "default", is_trainable=True)
        assert torch.equal(weights(model), before)
        assert all(
            own is other
            for own, other in zip(
                parameters, [p for p in model.parameters() if p.requires_grad]
            )
        )
        file = tmp_path / "start" / "adapter_config.json"
        changed = json.loads(file.read_text()) | {"lora_alpha": 99}
        file.write_text(json.dumps(changed))
        with pytest.raises(AdapterNameError, match="lora_alpha = 8, in the file 99"):
            model.load_adapter(tmp_path / "start", "default")
        model.merge_adapter()
        with pytest.raises(AdapterNameError, match="is merged: call unmerge_adapter"):
            model.load_adapter(tmp_path / "start", "default")


class TestOtherScripts:
    """More of what people do with Trainer, beside PEFT."""

    FIELDS = dict(r=4, target_modules=["q_proj", "v_proj"])

    def both(self):
        for package in (minipeft, peft):
            torch.manual_seed(0)
            yield package

    @pytest.mark.parametrize("names", [["mine"], ["default", "b"], ["a", "default"]])
    def test_the_last_of_some_adapters_is_trained_and_resumed(self, names, tmp_path):
        found = []
        for package in self.both():
            models = []
            for _ in range(2):
                torch.manual_seed(0)
                config = package.LoraConfig(**self.FIELDS)
                base = BASES["hf_llama"].make()
                model = package.get_peft_model(base, config, names[0])
                for name in names[1:]:
                    fields = dict(r=2, target_modules=["q_proj"])
                    model.add_adapter(name, package.LoraConfig(**fields))
                model.set_adapter(names[-1])
                models.append(model.train())
            whole, resumed = (trainer(m, tmp_path / package.__name__) for m in models)
            whole.train()
            checkpoint = tmp_path / package.__name__ / "checkpoint-2"
            resumed.train(resume_from_checkpoint=str(checkpoint))
            assert torch.equal(losses(resumed), losses(whole))
            assert models[1].active_adapters == [names[-1]]
            assert torch.equal(weights(models[1]), weights(models[0]))
            found.append((losses(whole), {p.name for p in checkpoint.iterdir()}))
        assert_same_losses(found[0][0], found[1][0])
        # each adapter here has its card beside it
        assert found[0][1] | {"README.md"} == found[1][1]

    def test_a_classifier_with_a_metric(self, tmp_path):
        found = []
        for package in self.both():
            config = copy.deepcopy(BASES["hf_llama"].make().config)
            config.num_labels = 3
            base = transformers.LlamaForSequenceClassification(config)
            fields = dict(task_type="SEQ_CLS", init_lora_weights="gaussian")
            config = package.LoraConfig(**self.FIELDS, **fields)
            model = package.get_peft_model(base, config)
            rows = [{**row, "labels": i % 3} for i, row in enumerate(TEXTS)]
            options = dict(
                load_best_model_at_end=True, metric_for_best_model="accuracy"
            )
            run = trainer(model, tmp_path / package.__name__, **options)
            run.train_dataset = rows[:8]
            run.eval_dataset = rows[8:]
            run.compute_metrics = lambda p: {
                "accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())
            }
            run.train()
            metrics = run.predict(rows[8:]).metrics
            found.append((losses(run), metrics["test_accuracy"]))
        assert_same_losses(found[0][0], found[1][0])
        assert found[0][1] == found[1][1]

    def test_an_encoder_decoder_that_generates(self, tmp_path):
        found = []
        for package in self.both():
            sizes = dict(d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4)
            config = transformers.T5Config(
                vocab_size=40, decoder_start_token_id=0, dropout_rate=0.0, **sizes
            )
            base = transformers.T5ForConditionalGeneration(config)
            fields = dict(task_type="SEQ_2_SEQ_LM", init_lora_weights="gaussian")
            config = package.LoraConfig(r=4, target_modules=["q", "v"], **fields)
            arguments = transformers.Seq2SeqTrainingArguments(
                output_dir=str(tmp_path / package.__name__),
                max_steps=4,
                learning_rate=0.05,
                logging_steps=1,
                predict_with_generate=True,
                generation_max_length=6,
                eval_strategy="steps",
                eval_steps=2,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            )
            rows = [
                {k: v for k, v in row.items() if k != "line_number"} for row in TEXTS
            ]
            run = transformers.Seq2SeqTrainer(
                model=package.get_peft_model(base, config),
                args=arguments,
                train_dataset=rows[:8],
                eval_dataset=rows[8:],
            )
            run.train()
            found.append((losses(run), run.predict(rows[8:]).predictions))
        assert_same_losses(found[0][0], found[1][0])
        assert (found[0][1] == found[1][1]).all()

    def test_a_card_by_trainer_says_that_it_is_an_adapter(self, tmp_path):
        BASES["hf_llama"].make().save_pretrained(tmp_path / "base: a")
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base: a")
        model = minipeft.get_peft_model(base, minipeft.LoraConfig(**self.FIELDS))
        run = trainer(model, tmp_path / "run")
        run.train()
        run.save_model()
        card = huggingface_hub.ModelCard.load(tmp_path / "run" / "README.md")
        assert card.data.base_model == str(tmp_path / "base: a")
        run.create_model_card(model_name="mine", tags="towns")
        card = huggingface_hub.ModelCard.load(tmp_path / "run" / "README.md")
        assert card.data.library_name == "peft"
        assert {"towns", "minipeft", "lora"} <= set(card.data.tags)
        assert card.data.base_model == str(tmp_path / "base: a")
        assert "Training hyperparameters" in card.text


class TestRecognition:
    def test_configurations_say_whether_they_are_of_prompts(self):
        for name in ("LoraConfig", "IA3Config", "LoHaConfig"):
            ours, theirs = (getattr(package, name)() for package in (minipeft, peft))
            assert ours.is_prompt_learning == theirs.is_prompt_learning
        for name in ("PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"):
            ours, theirs = (
                getattr(package, name)(num_virtual_tokens=2)
                for package in (minipeft, peft)
            )
            assert ours.is_prompt_learning == theirs.is_prompt_learning

    def test_it_counts_as_one_of_peft_s_but_runs_none_of_its_code(self, tmp_path):
        model, _ = pair(tmp_path)
        assert isinstance(model, peft.PeftModel) and isinstance(model, PeftModel)
        assert type(model).__module__ == "minipeft.model"
        theirs = vars(peft.PeftModel).keys() - vars(PeftModel).keys()
        for name in theirs - vars(torch.nn.Module).keys() - vars(object).keys():
            base_has_it = hasattr(model.get_base_model(), name)
            assert hasattr(model, name) == (base_has_it or name == "peft_config"), name
            assert name not in set(dir(model)) - {"peft_config"}, name
        assert not isinstance(
            minipeft.get_peft_model(BASES["llama"].make(), minipeft.LoraConfig()),
            peft.PeftModel,
        )

    @pytest.mark.parametrize("name", ["hf_llama", "hf_gpt2", "hf_qwen2"])
    def test_where_peft_is_not_installed_it_is_not_recognized(self, name, monkeypatch):
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda wanted, *more: None if wanted == "peft" else find(wanted, *more),
        )
        base = BASES[name]
        model = minipeft.get_peft_model(base.make(), METHODS["lora"](base))
        assert type(model) is PeftModel and not isinstance(model, peft.PeftModel)

    def test_copies_and_pickles(self, tmp_path):
        model, _ = pair(tmp_path)
        torch.save(model, tmp_path / "model.pt")
        stored = torch.load(tmp_path / "model.pt", weights_only=False)
        for other in (copy.deepcopy(model), stored):
            assert type(other) is type(model)
            assert torch.equal(weights(other), weights(model))


class TestFourBits:
    def test_a_base_from_transformers_bitsandbytes_config(self, tmp_path):
        """Both multiply by the same dequantized weights, in float32, but sum in another
        order: sums of 16 terms, nine a layer, through four steps."""
        pytest.importorskip("bitsandbytes")
        BASES["hf_llama"].make().save_pretrained(tmp_path / "base")

        def make():
            return transformers.AutoModelForCausalLM.from_pretrained(
                tmp_path / "base",
                quantization_config=transformers.BitsAndBytesConfig(
                    load_in_4bit=True,
                    bnb_4bit_quant_type="nf4",
                    bnb_4bit_compute_dtype=torch.float32,
                ),
                dtype=torch.float32,
                device_map="cpu",
            )

        models = pair(tmp_path, make=make)
        ours, theirs = train_both(tmp_path, models, eval_strategy="no")
        assert_within(losses(ours), losses(theirs), terms=16, steps=9 * 2 * 4)


class TestAccelerate:
    @pytest.mark.parametrize("method", ["lora", "dora", "ia3", "prompt", "whole head"])
    def test_a_loop(self, tmp_path, method):
        from accelerate import Accelerator

        found = []
        for model in pair(tmp_path, method=method):
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
            optimizer = torch.optim.SGD(
                [p for p in model.parameters() if p.requires_grad], lr=0.5
            )
            data = torch.utils.data.DataLoader([t["input_ids"] for t in TEXTS], 3)
            model, optimizer, data = accelerator.prepare(model, optimizer, data)
            for ids in data:
                with accelerator.accumulate(model):
                    accelerator.backward(model(input_ids=ids, labels=ids).loss)
                    optimizer.step()
                    optimizer.zero_grad()
            folder = tmp_path / f"saved{len(found)}"
            accelerator.unwrap_model(model).save_pretrained(
                folder,
                state_dict=accelerator.get_state_dict(model),
                is_main_process=accelerator.is_main_process,
                save_function=accelerator.save,
                safe_serialization=True,
            )
            found.append(load_file(folder / "adapter_model.safetensors"))
        own, other = found
        assert own.keys() == other.keys()
        for name in own:
            assert_within(own[name], other[name], terms=16, steps=9 * 2 * 4)

    def test_only_the_main_process_writes(self, tmp_path):
        model, _ = pair(tmp_path)
        model.save_pretrained(tmp_path / "nothing", is_main_process=False)
        assert not (tmp_path / "nothing").exists()
