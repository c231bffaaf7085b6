"""P-tuning: the network that makes the prompt."""

import pytest
import torch
from bases import BASES, run
from torch import nn

import minipeft
from minipeft import PeftModel, PromptEncoderConfig, get_peft_model


class TestEncoder:
    def test_tokens_depend_on_each_other_in_an_lstm_only(self):
        for kind, others_move in (("MLP", False), ("LSTM", True)):
            torch.manual_seed(0)
            config = PromptEncoderConfig(
                num_virtual_tokens=4, encoder_reparameterization_type=kind
            )
            adapter = get_peft_model(BASES["llama"].make(), config).base_model.adapters[
                "default"
            ]
            before = adapter.embeddings().detach()
            with torch.no_grad():
                adapter.prompt_embeddings[1] += 1
            moved = (adapter.embeddings() - before).abs().max(1).values > 1e-6
            assert moved.tolist() == [others_move, True, others_move, others_move]

    def test_the_lstm_is_the_paper_s(self):
        """Two bidirectional layers; their states are concatenated, and two matrices
        with a ReLU between compute the prompt."""
        torch.manual_seed(0)
        config = PromptEncoderConfig(
            num_virtual_tokens=3,
            encoder_reparameterization_type="LSTM",
            encoder_hidden_size=5,
        )
        adapter = get_peft_model(BASES["llama"].make(), config).base_model.adapters[
            "default"
        ]
        lstm, mlp, x = (
            adapter.encoder.lstm,
            adapter.encoder.mlp,
            adapter.prompt_embeddings,
        )
        for layer in range(2):
            both = []
            for way in ("", "_reverse"):
                cell = nn.LSTMCell(x.shape[1], 5)
                cell.load_state_dict(
                    {
                        name: getattr(lstm, f"{name}_l{layer}{way}")
                        for name in cell.state_dict()
                    }
                )
                states, state = [], None
                for vector in x.flip(0) if way else x:
                    state = cell(vector[None], state)
                    states.append(state[0][0])
                both.append(torch.stack(states[::-1] if way else states))
            x = torch.cat(both, 1)
        torch.testing.assert_close(adapter.embeddings(), mlp[2](torch.relu(mlp[0](x))))

    def test_dropout_acts_between_the_layers_in_training(self):
        config = PromptEncoderConfig(
            num_virtual_tokens=3,
            encoder_reparameterization_type="LSTM",
            encoder_dropout=0.5,
        )
        model = get_peft_model(BASES["llama"].make(), config)
        assert torch.equal(run(model), run(model))
        assert not torch.equal(run(model.train()), run(model))


class TestSaving:
    def test_files_hold_the_prompt_without_its_encoder(self, tmp_path):
        model = get_peft_model(
            BASES["llama"].make(), PromptEncoderConfig(num_virtual_tokens=3)
        )
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(BASES["llama"].make(), tmp_path)
        assert again.base_model.adapters["default"].encoder is None and torch.equal(
            run(again), run(model)
        )


class TestConfig:
    def test_invalid_fields_are_refused(self):
        wrong = dict(
            encoder_reparameterization_type="GRU",
            encoder_hidden_size=0,
            encoder_num_layers=0,
            encoder_dropout=1.0,
        )
        for field, value in wrong.items():
            with pytest.raises(minipeft.ConfigError, match=field):
                PromptEncoderConfig(num_virtual_tokens=2, **{field: value})
        with pytest.warns(UserWarning, match="it belongs to .*='LSTM'"):
            PromptEncoderConfig(num_virtual_tokens=2, encoder_num_layers=3)
