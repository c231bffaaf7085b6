"""Random subspaces: the projections against explicit matrices, and what is particular
to training within one."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bases import BASES, METHODS, adapted, close, differ, inputs, loss_of, run, shake
from safetensors.torch import load_file
from tolerance import chance, size, tolerance
from torch import nn

from minipeft import ConfigError, PeftModel, SubspaceConfig, TargetError, get_peft_model
from minipeft.methods.projections import PROJECTIONS, Dense, hadamard
from minipeft.methods.subspace import param_locations, shifted_params

kinds = pytest.mark.parametrize("kind", PROJECTIONS)


def make(kind, D, d, seed=0):
    return PROJECTIONS[kind](D, d, torch.Generator().manual_seed(seed))


def matrix(P, d):
    """P (D, d), column by column."""
    return torch.stack([P(column) for column in torch.eye(d)], 1)


class TestProjections:
    @pytest.mark.parametrize("n", [1, 2, 8, 32, 64, 512, 4096])
    def test_hadamard_is_the_matrix_of_parities(self, n):
        i = torch.arange(n)
        # ones that i and j have in common
        parity = sum(((i[:, None] & i[None]) >> k) & 1 for k in range(13)) % 2
        x = torch.randn(3, n, generator=torch.Generator().manual_seed(0))
        H = (1.0 - 2 * parity) / math.sqrt(n)
        close(hadamard(x) / math.sqrt(n), x @ H, tolerance(torch.float32, terms=n))
        close(hadamard(hadamard(x)) / n, x)

    @kinds
    @pytest.mark.parametrize("D, d", [(4000, 1), (4000, 5), (4000, 64), (4000, 100)])
    def test_columns_have_length_1_and_are_nearly_orthogonal(self, kind, D, d):
        P = matrix(make(kind, D, d), d).double()
        gram = P.T @ P
        off = gram - gram.diag().diag()
        # D squares of mean 1 / D; their spread, of Gaussian ones, is sqrt(2) / D
        lots = chance(math.sqrt(2), D, errors=6)
        rounded = tolerance(torch.float32, steps=4)  # a root, a quotient, both squared
        close(gram.diag(), torch.ones(d), rounded if kind == "hash" else lots)
        assert off.abs().max() <= (0 if kind == "hash" else lots)
        theta = torch.randn(d, generator=torch.Generator().manual_seed(1)).double()
        assert abs((P @ theta).norm() / theta.norm() - 1) < lots

    @pytest.mark.parametrize("d", [3, 8, 40])
    def test_fastfood_is_its_product_of_matrices(self, d):
        D, P = 100, make("fastfood", 100, d)
        H = hadamard(torch.eye(P.n))
        explicit = [
            H @ gauss.diag() @ torch.eye(P.n)[order] @ H @ sign.float().diag()
            for sign, order, gauss in zip(P.sign, P.order, P.gauss)
        ]
        close(matrix(P, d), torch.cat(explicit)[:D, :d])
        assert torch.linalg.matrix_rank(matrix(P, d)) == d

    @kinds
    def test_the_gradient_is_that_of_the_matrix(self, kind):
        P, theta = make(kind, 300, 20), torch.randn(20, requires_grad=True)
        g = torch.randn(300)
        P(theta).backward(g)
        close(theta.grad, matrix(P, 20).T @ g)

    @kinds
    def test_a_seed_makes_the_projection(self, kind):
        theta = torch.ones(20)
        assert torch.equal(make(kind, 300, 20)(theta), make(kind, 300, 20)(theta))
        differ(make(kind, 300, 20)(theta), make(kind, 300, 20, seed=1)(theta))

    @pytest.mark.skipif(
        not Path("/proc/self/status").exists(),
        reason="the peak of a process is read from /proc",
    )
    def test_memory_for_three_million_parameters(self):
        """Beside the model itself: the projection, forward and backward."""
        code = """
import torch
from minipeft.methods.projections import Fastfood
torch.set_num_threads(1)
def memory(name):
    lines = open("/proc/self/status").readlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))
theta = torch.zeros(4096, requires_grad=True)
Fastfood(8192, 4096, torch.Generator())(theta).sum().backward()  # load all code
open("/proc/self/clear_refs", "w").write("5")  # forget the peak
before = memory("VmRSS:")
P = Fastfood(3_000_000, 4096, torch.Generator())
theta = torch.zeros(4096, requires_grad=True)
P(theta).sum().backward()
print(memory("VmHWM:") - before)
"""
        megabytes = float(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout
        )
        assert 10 < megabytes < 200


class TestSubspace:
    @kinds
    @pytest.mark.parametrize("name", ["llama", "hf_qwen2", "hf_gpt2"])
    def test_the_model_is_the_base_moved_by_p_theta(self, name, kind):
        base = BASES[name]
        model = shake(
            get_peft_model(base.make(), SubspaceConfig(d=30, projection=kind, seed=5))
        )
        plain, adapter = base.make(), model.base_model.adapters["default"]
        parameters = [
            where[0][0]._parameters[where[0][1]] for where in param_locations(plain)
        ]
        # tied ones once
        assert {id(p) for p in parameters} == {id(p) for p in plain.parameters()}
        D = sum(p.numel() for p in parameters)
        step = matrix(make(kind, D, 30, 5), 30) @ adapter.theta.detach()
        with torch.no_grad():
            for p, s in zip(parameters, step.split([p.numel() for p in parameters])):
                p += s.view_as(p)
        close(run(model), run(plain))
        plain.requires_grad_(True)
        loss_of(plain).backward()
        loss_of(model).backward()
        zero = torch.zeros(1)
        gradient = torch.cat(
            [
                (zero.expand(p.numel()) if p.grad is None else p.grad.flatten())
                for p in parameters
            ]
        )
        # the chain rule: P^T g
        close(adapter.theta.grad, matrix(adapter.P, 30).T @ gradient)

    def test_structure_aware_has_a_factor_for_each_tensor(self):
        base = BASES["llama"]
        m = len(param_locations(base.make()))
        config = SubspaceConfig(d=m + 7, structure_aware=True)
        model, twin = (
            get_peft_model(base.make(), config),
            get_peft_model(base.make(), SubspaceConfig(d=7)),
        )
        aware, plain = (each.base_model.adapters["default"] for each in (model, twin))
        assert len(aware.theta) == 7 and torch.equal(aware.lambdas, torch.ones(m))
        assert model.get_nb_trainable_parameters()[0] == m + 7
        with torch.no_grad():
            plain.theta.copy_(torch.randn(7))
            aware.theta.copy_(plain.theta)
            close(run(model), run(twin))
            aware.lambdas.copy_(torch.arange(m))
        old = [
            module._parameters[name]
            for (module, name), *_ in param_locations(base.make())
        ]
        for i, ((_, moved), (_, by_one), p) in enumerate(
            zip(
                shifted_params(base.make(), aware.shifts()),
                shifted_params(base.make(), plain.shifts()),
                old,
            )
        ):
            # p goes away in both differences, but for its rounding
            gone = tolerance(torch.float32, (1 + i) * size(p), steps=2)
            close(moved - p, i * (by_one - p), gone)

    def test_files_hold_d_numbers_and_know_their_projection(self, tmp_path):
        base = BASES["hf_llama"]
        model = shake(
            get_peft_model(
                base.make(), SubspaceConfig(d=90, structure_aware=True, seed=3)
            )
        )
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        assert sum(t.numel() for t in tensors.values()) == 90 and set(tensors) == {
            "theta",
            "lambdas",
        }
        assert torch.equal(
            run(PeftModel.from_pretrained(base.make(), tmp_path)), run(model)
        )
        # other tensors
        with pytest.raises(ConfigError, match="seed 3 gives another projection"):
            PeftModel.from_pretrained(BASES["hf_gpt2"].make(), tmp_path)
        saved = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps(saved | {"seed": 4}))
        with pytest.raises(ConfigError, match="seed 4 gives another projection"):
            PeftModel.from_pretrained(base.make(), tmp_path)

    def test_a_subspace_around_loras_moves_the_bare_weights(self):
        base = BASES["llama"]
        model = adapted(METHODS["lora"], base, "lora")
        model.add_adapter("subspace", SubspaceConfig(d=20))
        shake(model, "subspace")
        model.set_adapter(["lora", "subspace"])
        together = run(model)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.merge_adapter()
        close(run(model), together)
        model.unmerge_adapter()  # in the right order: both write the same weights
        assert all(
            torch.equal(value, state[name])
            for name, value in model.state_dict().items()
        )
        assert torch.equal(run(model), together)
        model.set_adapter("lora")
        differ(run(model), together)

    def test_tied_weights_stay_tied(self):
        model = shake(get_peft_model(BASES["hf_qwen2"].make(), SubspaceConfig(d=20)))
        plain = model.merge_and_unload()
        assert (
            plain.lm_head.weight is plain.model.embed_tokens.weight
            and plain.config.tie_word_embeddings
        )

    def test_generation(self):
        for name in ("llama", "hf_llama"):
            model = shake(get_peft_model(BASES[name].make(), SubspaceConfig(d=20)))
            if hasattr(model.get_base_model(), "generate"):
                tokens = model.generate(**inputs(), max_new_tokens=5, do_sample=False)
                assert torch.equal(
                    tokens,
                    model.merge_and_unload().generate(
                        **inputs(), max_new_tokens=5, do_sample=False
                    ),
                )

    def test_what_cannot_be(self):
        for wrong in (0, -3, 2.5, True, "8"):
            with pytest.raises(
                ConfigError, match="d = .*: expected (a positive integer|int)"
            ):
                SubspaceConfig(d=wrong)
        with pytest.raises(
            ConfigError, match="unknown projection 'fastfud' .did you mean 'fastfood'"
        ):
            SubspaceConfig(projection="fastfud")
        for config, says in (
            (SubspaceConfig(d=100), "d = 100, but the model has only 30 parameters"),
            (
                SubspaceConfig(d=2, structure_aware=True),
                "spends 2 numbers on 2 tensors",
            ),
        ):
            with pytest.raises(ConfigError, match=says):
                get_peft_model(nn.Linear(5, 5), config)
        with pytest.raises(
            ConfigError,
            match=r"dense projection of 3,000,000 x 1,000 would take 12.0 GB",
        ):
            Dense(3_000_000, 1000, torch.Generator())
        model = get_peft_model(BASES["llama"].make(), SubspaceConfig(d=20)).train()
        model.gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="switch it off"):
            model(**inputs())
        run(model.eval())
        bitsandbytes = pytest.importorskip("bitsandbytes")
        packed = nn.Sequential(
            nn.Linear(8, 64), bitsandbytes.nn.Linear4bit(64, 64).to("cpu")
        )
        with pytest.raises(TargetError, match="4-bit weights cannot be moved"):
            get_peft_model(packed, SubspaceConfig(d=20))

    def test_it_trains(self):
        """Least squares in a subspace has a closed solution: gradient descent finds
        it."""
        torch.manual_seed(0)
        layer, x, y = nn.Linear(10, 3), torch.randn(50, 10), torch.randn(50, 3)
        model = get_peft_model(layer, SubspaceConfig(d=6, projection="hash"))
        P = matrix(
            model.base_model.adapters["default"].P, 6
        )  # weight's rows, then bias
        # (150, 6)
        design = torch.stack(
            [x @ c[:30].view(3, 10).T + c[30:] for c in P.T], -1
        ).flatten(0, 1)
        best = torch.linalg.lstsq(
            design, (y - layer(x)).detach().flatten()[:, None]
        ).solution[:, 0]
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=0.5
        )
        for _ in range(300):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        # each step leaves this share, at most, of the way that is still to go
        pull = 2 / y.numel() * torch.linalg.eigvalsh(design.T @ design)
        left = (1 - 0.5 * pull).abs().max() ** 300 * best.norm()
        rounded = tolerance(torch.float32, size(best), terms=len(design), steps=300)
        close(model.base_model.adapters["default"].theta, best, left + rounded)
