"""Random sequences of operations on a model with adapters, and what must hold after
every one of them.

`make test` runs a few sequences, the same ones every time. `make fuzz` runs many, with
random seeds: MINIPEFT_FUZZ is the number of sequences. MINIPEFT_FUZZ_SEED repeats a run
whose seed was printed.
"""

import collections
import copy
import os
import random
import tempfile
import warnings
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from bases import BASES, CASES, IN_4_BITS, inputs, logits, run, shake
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from tolerance import tolerance

import minipeft
from minipeft import (
    AdapterFileError,
    AdapterNameError,
    ConfigError,
    NotMergeableError,
    PeftModel,
    Slot,
    TargetError,
    get_peft_model,
)
from minipeft.slot import ActiveAdapters

NAMES = ("default", "a", "b", "c")
REFUSALS = (
    AdapterFileError,
    AdapterNameError,
    ConfigError,
    NotMergeableError,
    TargetError,
    ValueError,
)
# Some 20 sums of at most 40 terms follow one another, and norms enlarge what rounding
# has done to small values before them; a wrong merge changes the first digits.
SUMS = dict(terms=40, steps=20)
ENLARGED = 50
ASKED = int(os.environ.get("MINIPEFT_FUZZ", 0))
counts = collections.Counter()


class Kind:
    """A way to adapt a model: a method of bases.py, or one that meets others inside or
    around its own layers."""

    def __init__(self, config, fields, mergeable=True, step=0.2, same_at_start=True):
        self.config = config
        self.fields = fields  # base case -> keyword arguments
        self.mergeable = mergeable
        self.step = step
        self.same_at_start = same_at_start  # a new one changes nothing

    def make(self, base):
        return getattr(minipeft, self.config)(**self.fields(base))


def lora(**fields):
    return Kind("LoraConfig", lambda base: dict(r=2, **fields))


def copied(block):
    """A LoRA beside a trained copy of a whole module."""

    def fields(base):
        outside = [name for name in base.targets if name != base.block]
        return dict(
            r=2, target_modules=[outside[0]], modules_to_save=[getattr(base, block)]
        )

    return Kind("LoraConfig", fields)


NESTED = {
    "lora_embedding": Kind(
        "LoraConfig", lambda base: dict(r=2, target_modules=[base.embedding])
    ),
    "lora_all": lora(target_modules="all-linear"),
    "lora_inner": Kind(
        "LoraConfig", lambda base: dict(r=3, target_modules=[base.targets[-1]])
    ),
    "lora_ranks": Kind(
        "LoraConfig",
        lambda base: dict(
            r=4,
            target_modules=list(base.targets),
            rank_pattern={base.targets[0]: 2},
            alpha_pattern={base.targets[-1]: 3.0},
        ),
    ),
    "lora_bias": Kind(
        "LoraConfig",
        lambda base: dict(
            r=2,
            target_modules=list(base.targets),
            lora_bias=True,
            init_lora_weights=False,
        ),
        same_at_start=False,
    ),
    "save_norm": copied("norm"),
    "save_block": copied("block"),
    "save_embedding": copied("embedding"),
    "bottleneck_inner": Kind(
        "BottleneckConfig",
        lambda base: dict(r=2, target_modules=[base.targets[-1]]),
        mergeable=False,
    ),
}


def kinds(base):
    """{name: Kind} of everything that `base` can have."""
    found = {
        method.name: Kind(
            method.config,
            lambda base, method=method: method.options(base),
            # whether (IA)3 or a bias can be merged depends on the layer
            method.mergeable,
            method.step,
            same_at_start=method.where is not None or "subspace" in method.name,
        )
        for method, other in CASES
        if other.name == base.name
    }
    return found | NESTED


def bits(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def snapshot(model):
    """All that a refusal must leave as it was."""
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    types = {name: type(module) for name, module in model.named_modules()}
    modes = {name: module.training for name, module in model.named_modules()}
    hooks = {
        name: len(module._forward_hooks) + len(module._forward_pre_hooks)
        for name, module in model.named_modules()
    }
    configs = {name: config.to_dict() for name, config in model.peft_config.items()}
    tie = getattr(getattr(model, "config", None), "tie_word_embeddings", None)
    names = model.active_adapters, model.merged_adapters
    return bits(model.state_dict()), (flags, types, modes, hooks, configs, tie, names)


def assert_unchanged(model, before):
    tensors, rest = before
    now, now_rest = snapshot(model)
    assert_same_bits(now, tensors)
    for found, expected in zip(now_rest, rest):
        assert found == expected


def close(found, expected):
    scale = max(1.0, float(expected.abs().max()))
    error = float((found - expected).abs().max())
    allowed = ENLARGED * tolerance(torch.float32, scale, **SUMS)
    assert error <= allowed, f"differ by {error:.1e}, allowed are {allowed:.1e}"


def evaluated(model):
    """Logits in eval mode; the mode stays as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return run(model)
    finally:
        for module, mode in modes:
            module.training = mode


def alone(model, name):
    """Logits with one adapter and nothing merged."""
    if model.merged_adapters:
        model = copy.deepcopy(model)
        model.unmerge_adapter()
    with model.base_model.active.only(name):
        return evaluated(model)


def without_merging(model, merged, active):
    """What a model with merged adapters has to compute, without merging: where a slot
    has merged adapters, these are the active ones."""
    model = copy.deepcopy(model)
    model.unmerge_adapter()
    for slot in model.modules():
        if isinstance(slot, Slot):
            slot.active = ActiveAdapters()
            here = [name for name in merged if name in slot.adapters]
            slot.active.names = here or active
    return evaluated(model)


def experts(model):
    """{name of a fusion: names of its experts}"""
    return {
        name: config.adapters
        for name, config in model.peft_config.items()
        if config.peft_type == "FUSION"
    }


name_of = st.sampled_from(NAMES)
names_of = st.lists(name_of, min_size=1, max_size=3, unique=True)


class Adapters(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        counts["sequences"] += 1
        if ASKED and counts["sequences"] % 100 == 0:
            print(f"{counts['sequences']:,} of {ASKED:,} sequences", flush=True)
        warnings.simplefilter("ignore")
        self.folder = tempfile.TemporaryDirectory()

    def teardown(self):
        if hasattr(self, "model"):
            self.check_base(self.model.unload())
        self.folder.cleanup()

    @initialize(base=st.sampled_from([*BASES, *IN_4_BITS]), data=st.data())
    def start(self, base, data):
        self.base = (BASES | IN_4_BITS)[base]
        self.kinds = kinds(self.base)
        self.kind_of = {}
        plain = self.base.make()
        self.original = bits(plain.state_dict())
        self.original_output = run(plain)
        self.size = sum(map(minipeft.weights.logical_numel, plain.parameters()))
        kind = data.draw(st.sampled_from(sorted(self.kinds)), label="kind")
        if not self.base.dense and kind == "save_block":  # 4 bits cannot be trained
            kind = "lora"
        self.model = get_peft_model(plain, self.kinds[kind].make(self.base))
        self.kind_of["default"] = kind
        self.check_new("default")
        self.add("a", data)

    # What the operations share.

    def attempt(self, operation, *args, allowed=REFUSALS, **kwargs):
        """Was it done? A refusal has to leave everything as it was."""
        counts["operations"] += 1
        counts[getattr(operation, "__name__", "operation")] += 1
        before = snapshot(self.model)
        try:
            operation(*args, **kwargs)
        except allowed as error:
            assert str(error)
            counts["refusals"] += 1
            assert_unchanged(self.model, before)
            return False
        return True

    def refused(self, operation, *args, allowed=REFUSALS, **kwargs):
        assert not self.attempt(operation, *args, allowed=allowed, **kwargs)

    def done(self, operation, *args, **kwargs):
        assert self.attempt(operation, *args, allowed=(), **kwargs)

    def check_new(self, name):
        """A new adapter starts from the model as it was, and a shaken one is felt."""
        kind = self.kinds[self.kind_of[name]]
        if kind.same_at_start:
            close(alone(self.model, name), self.original_output)
        shake(self.model, name, step=kind.step)
        output = alone(self.model, name)
        assert (output - self.original_output).abs().max() > 1e-4, "does nothing"

    def check_base(self, model):
        """The plain model, bit for bit what the base was."""
        assert not any(isinstance(module, Slot) for module in model.modules())
        assert_same_bits(model.state_dict(), self.original)
        assert torch.equal(evaluated(model), self.original_output)

    def known(self, names):
        return all(name in self.model.peft_config for name in names)

    def mergeable(self, names):
        return all(self.kinds[self.kind_of[name]].mergeable for name in names)

    # The operations.

    @rule(name=name_of, data=st.data())
    def add(self, name, data):
        kind = data.draw(st.sampled_from(sorted(self.kinds)), label="kind")
        config = self.kinds[kind].make(self.base)
        if name in self.model.peft_config:
            self.refused(self.model.add_adapter, name, config, allowed=AdapterNameError)
        elif kind.startswith("save_"):  # not around modules that have adapters
            if self.attempt(self.model.add_adapter, name, config, allowed=TargetError):
                self.kind_of[name] = kind
                self.check_new(name)
        else:
            self.done(self.model.add_adapter, name, config)
            self.kind_of[name] = kind
            self.check_new(name)

    @rule(names=names_of)
    def set(self, names):
        copies = [n for n in names if self.kind_of.get(n, "").startswith("save_")]
        if not self.known(names):
            self.refused(self.model.set_adapter, names, allowed=AdapterNameError)
        elif len(copies) > 1:
            self.attempt(self.model.set_adapter, names, allowed=AdapterNameError)
        else:
            self.done(self.model.set_adapter, names)
            assert self.model.active_adapters == names
            assert self.model.merged_adapters == []  # as in PEFT

    @rule(name=name_of)
    def delete(self, name):
        needed = any(name in used for used in experts(self.model).values())
        if needed or not self.known([name]):
            self.refused(self.model.delete_adapter, name, allowed=ValueError)
        else:
            merged = [n for n in self.model.merged_adapters if n != name]
            self.done(self.model.delete_adapter, name)
            assert self.model.merged_adapters == merged
            del self.kind_of[name]

    @rule(names=st.none() | names_of, safe=st.booleans(), lossy=st.booleans())
    def merge(self, names, safe, lossy):
        asked = self.model.active_adapters if names is None else names
        options = dict(safe_merge=safe, lossy=lossy)
        merge = self.model.merge_adapter
        if not self.known(asked):
            self.refused(merge, names, **options, allowed=AdapterNameError)
            return
        new = [name for name in asked if name not in self.model.merged_adapters]
        if not self.mergeable(new):
            self.refused(merge, names, **options, allowed=NotMergeableError)
        elif self.base.dense or lossy:
            before = self.model.merged_adapters
            if self.attempt(merge, names, **options, allowed=NotMergeableError):
                assert self.model.merged_adapters == before + new
            else:
                self.check_refused_merge(new)
        else:
            self.attempt(merge, names, **options, allowed=NotMergeableError)

    def check_refused_merge(self, names):
        """Only a bias that the layer lacks may be the reason."""
        reasons = {"lora_bias", "bitfit", "bitfit_added", "ia3"}
        assert any(self.kind_of[name] in reasons for name in names)

    @rule(name=name_of)
    def merge_something_broken(self, name):
        if not self.known([name]):
            return
        parameters = [
            p
            for part in self.model._adapters_by_path(name).values()
            for p in part.parameters()
        ]
        if not parameters or name in self.model.merged_adapters:
            return
        values = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters:
                p.fill_(float("inf"))
        self.refused(
            self.model.merge_adapter, [name], safe_merge=True, allowed=NotMergeableError
        )
        with torch.no_grad():
            for p, value in zip(parameters, values):
                p.copy_(value)

    @rule()
    def unmerge(self):
        self.done(self.model.unmerge_adapter)
        assert self.model.merged_adapters == []

    @rule()
    def disable(self):
        counts["operations"] += 1
        before = snapshot(self.model)
        with self.model.disable_adapter():
            self.check_disabled()
            self.refused(self.model.merge_adapter, allowed=NotMergeableError)
            self.check_disabled()
        assert_unchanged(self.model, before)

    def check_disabled(self):
        assert torch.equal(evaluated(self.model), self.original_output)
        bare = minipeft.targets.bare_modules(self.model.get_base_model())
        now = {
            p.data_ptr(): p for module in bare for p in module.parameters(recurse=False)
        }
        same = [
            any(
                p.shape == q.shape and torch.equal(p, q) for q in self.original.values()
            )
            for p in now.values()
        ]
        assert all(same)

    @rule(names=st.lists(st.sampled_from([*NAMES, "__base__"]), min_size=3, max_size=3))
    def mixed_rows(self, names):
        used = [name for name in names if name != "__base__"]
        rows = dict(adapter_names=names)
        if not self.known(used) or self.model.merged_adapters:
            self.refused(evaluated_with, self.model, **rows, allowed=ValueError)
            return
        # (IA)3 and others may stand around blocks that are called with keywords
        if self.attempt(evaluated_with, self.model, **rows, allowed=ValueError):
            together = evaluated_with(self.model, **rows)
            for row, name in enumerate(names):
                expected = (
                    self.original_output
                    if name == "__base__"
                    else alone(self.model, name)
                )
                close(together[row], expected[row])

    @rule(name=name_of, new=name_of, onto_base=st.booleans())
    def save_and_load(self, name, new, onto_base):
        if not self.known([name]):
            return
        folder = Path(self.folder.name) / f"{counts['operations']}"
        self.done(self.model.save_pretrained, folder, selected_adapters=[name])
        folder = folder if name == "default" else folder / name
        expected = alone(self.model, name)
        if onto_base and name not in experts(self.model):
            again = PeftModel.from_pretrained(self.base.make(), folder)
            assert torch.equal(evaluated(again), expected)
        load = self.model.load_adapter
        if new in self.model.peft_config:
            # where the configurations are equal, the values are taken over
            if self.attempt(load, folder, new, allowed=AdapterNameError):
                self.loaded(name, new, expected)
        elif self.kind_of[name].startswith("save_"):
            if self.attempt(load, folder, new, allowed=TargetError):
                self.loaded(name, new, expected)
        else:
            self.done(load, folder, new)
            self.loaded(name, new, expected)

    def loaded(self, name, new, expected):
        self.kind_of[new] = self.kind_of[name]
        assert torch.equal(alone(self.model, new), expected)

    @rule(
        names=st.lists(name_of, min_size=2, max_size=3, unique=True),
        new=name_of,
        weights=st.lists(st.sampled_from([0.7, -0.3, 1.5]), min_size=3, max_size=3),
        way=st.sampled_from(minipeft.weighted.COMBINATION_TYPES),
    )
    def weighted(self, names, new, weights, way):
        weights = weights[: len(names)]
        arguments = dict(combination_type=way)
        if any(word in way for word in ("ties", "dare", "magnitude")):
            arguments["density"] = 0.6
        add = self.model.add_weighted_adapter
        if not self.known(names) or self.known([new]):
            self.refused(add, names, weights, new, **arguments)
            return
        ones = [self.kind_of[name] for name in names]
        if self.attempt(add, names, weights, new, **arguments):
            self.kind_of[new] = self.kind_of[names[0]]
            if way == "cat" and all(kind in SUMMABLE for kind in ones):
                self.check_sum(names, weights, new)
        else:
            plain = all(kind == ones[0] and kind in SUMMABLE for kind in ones)
            assert not plain, "plain LoRAs of equal ranks can be combined"

    def check_sum(self, names, weights, new):
        for slot in self.model.modules():
            if isinstance(slot, Slot) and new in slot.adapters:
                terms = [
                    w * slot.adapters[name].delta(minipeft.Base(slot, name))
                    for name, w in zip(names, weights)
                    if name in slot.adapters
                ]
                found = slot.adapters[new].delta(minipeft.Base(slot, new))
                close(found.detach(), sum(terms).detach())

    @rule(name=name_of, names=st.lists(name_of, min_size=2, max_size=2, unique=True))
    def fuse(self, name, names):
        config = minipeft.FusionConfig(adapters=names)
        if not self.known(names) or self.known([name]):
            self.refused(self.model.add_adapter, name, config)
        elif self.attempt(self.model.add_adapter, name, config):
            self.kind_of[name] = "fusion"
            self.kinds["fusion"] = Kind("FusionConfig", None, mergeable=False)
            shake(self.model, name, step=0.1)
            output = alone(self.model, name)
            assert (output - self.original_output).abs().max() > 1e-4, "does nothing"

    @rule()
    def train_a_step(self):
        model = self.model
        if not model.active_adapters:
            return
        before = snapshot(model)[0]
        modes = [(module, module.training) for module in model.modules()]
        model.train()
        if self.attempt(train_a_step, model, allowed=(ValueError, RuntimeError)):
            after = model.state_dict()
            moved = {k for k in before if not torch.equal(before[k], after[k])}
            own = {n for n, p in model.named_parameters() if p.requires_grad}
            assert moved <= own | buffers_of(model), moved - own
            if own and not model.merged_adapters:
                assert moved
        else:
            assert model.merged_adapters or checkpoints(model), "training is refused"
        for module, mode in modes:
            module.training = mode
        model.zero_grad()

    @rule(reentrant=st.none() | st.booleans())
    def checkpointing(self, reentrant):
        if not self.base.layered:
            return
        if reentrant is None:
            self.done(self.model.gradient_checkpointing_disable)
        else:
            options = {"use_reentrant": reentrant}
            enable = self.model.gradient_checkpointing_enable
            self.done(enable, gradient_checkpointing_kwargs=options)

    @rule(keep=st.booleans())
    def deepcopy(self, keep):
        counts["operations"] += 1
        model, other = self.model, copy.deepcopy(self.model)
        before = snapshot(model)
        assert_unchanged(other, before)
        assert torch.equal(evaluated(other), evaluated(model))
        with torch.no_grad():
            for parameter in (other if keep else model).parameters():
                if parameter.is_floating_point():
                    parameter += 1
        (other if keep else model).unload()
        self.model = model if keep else other
        assert_unchanged(self.model, before)

    @rule(mode=st.booleans())
    def train_or_eval(self, mode):
        before = evaluated(self.model)
        self.done(self.model.train, mode)
        assert torch.equal(evaluated(self.model), before)

    @rule()
    def state_dict(self):
        other = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if ".adapters." in name:
                    parameter.zero_()
        counts["operations"] += 1
        other.load_state_dict(self.model.state_dict(), strict=True)
        assert torch.equal(evaluated(other), evaluated(self.model))

    @rule(names=st.none() | names_of)
    def merge_and_unload(self, names):
        counts["operations"] += 1
        asked = self.model.active_adapters if names is None else names
        other = copy.deepcopy(self.model)
        before = snapshot(other)
        options = {} if self.base.dense else {"lossy": True}
        try:
            plain = other.merge_and_unload(adapter_names=names, **options)
        except REFUSALS:
            counts["refusals"] += 1
            assert_unchanged(other, before)
            return
        assert not any(isinstance(module, Slot) for module in plain.modules())
        if self.base.dense:
            merged = dict.fromkeys([*self.model.merged_adapters, *asked])
            # what is only active, around other layers, is gone
            close(evaluated(plain), without_merging(self.model, list(merged), []))

    @rule()
    def unload_and_start_again(self):
        counts["operations"] += 1
        plain = self.model.unload()
        self.check_base(plain)
        assert self.model.peft_config == {}
        self.kind_of = {"default": "lora"}
        config = self.kinds["lora"].make(self.base)
        self.model = get_peft_model(plain.eval(), config)
        self.check_new("default")

    # What holds after each of them.

    @invariant()
    def holds(self):
        if not hasattr(self, "model"):
            return
        self.check_counts()
        if self.model.merged_adapters and self.base.dense:
            names = self.model.merged_adapters, self.model.active_adapters
            close(evaluated(self.model), without_merging(self.model, *names))

    def check_counts(self):
        model = self.model
        own = {
            name: [
                p
                for part in model._adapters_by_path(name).values()
                for p in part.parameters()
            ]
            for name in model.peft_config
        }
        trainable = sum(p.numel() for ps in own.values() for p in ps if p.requires_grad)
        everything = self.size + sum(p.numel() for ps in own.values() for p in ps)
        found = model.get_nb_trainable_parameters()
        if not model.merged_adapters:  # merging into one of two tied weights unties
            assert found == (trainable, everything)
        assert found[0] == trainable
        assert set(model.merged_adapters) <= set(model.peft_config)
        assert set(model.active_adapters) <= set(model.peft_config)


SUMMABLE = {"lora", "lora_embedding", "lora_all", "lora_inner"}


def buffers_of(model):
    return {name for name, _ in model.named_buffers()}


def checkpoints(model):
    return minipeft.targets.uses_grad_checkpointing(model.get_base_model())


def evaluated_with(model, adapter_names):
    with torch.no_grad():
        output = logits(model(**inputs(), adapter_names=adapter_names))
    return output[:, -inputs()["input_ids"].shape[1] :]


def train_a_step(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = logits(model(**inputs())).float().logsumexp(-1).mean()
    loss.backward()
    torch.optim.SGD(trained, lr=0.01).step()


@pytest.mark.filterwarnings("ignore")
def test_random_sequences_of_operations():
    counts.clear()
    options = dict(
        max_examples=ASKED or 25,
        stateful_step_count=14,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    try:
        if not ASKED:
            quick = settings(**options, derandomize=True, phases=[Phase.generate])
            run_state_machine_as_test(Adapters, settings=quick)
            return
        number = int(os.environ.get("MINIPEFT_FUZZ_SEED", random.randrange(2**32)))
        print(f"\nMINIPEFT_FUZZ_SEED={number}")
        run_state_machine_as_test(seed(number)(Adapters), settings=settings(**options))
    finally:
        print("\n" + ", ".join(f"{count:,} {what}" for what, count in counts.items()))
