"""AdaLoRA's budget: which triplets are pruned while it trains. See adalora.py."""

import torch

from ..config import ConfigError
from .adalora import AdaLora, AdaLoraConfig


class RankAllocator:
    """Prunes triplets while an AdaLoRA trains. Used like a scheduler: call `step` after
    optimizer.step() and before zero_grad(), for it reads the gradients."""

    def __init__(self, model, adapter_name="default"):
        self.config = model.peft_config[adapter_name]
        if not isinstance(self.config, AdaLoraConfig):
            raise ConfigError(
                f"{adapter_name!r} is not an AdaLoRA: {type(self.config).__name__}"
            )
        self.adapters = {
            path: part
            for path, part in model._adapters_by_path(adapter_name).items()
            if isinstance(part, AdaLora)
        }
        trained = [p for a in self.adapters.values() for p in a.parameters()]
        self.sensitivity = {p: torch.zeros_like(p) for p in trained}
        self.uncertainty = {p: torch.zeros_like(p) for p in trained}
        self.steps = 0  # done so far

    def state_dict(self):
        """All that a training that was stopped needs to go on, as tensors."""
        state = {"steps": torch.tensor(self.steps)}
        for path, adapter in self.adapters.items():
            state[f"{path}.kept"] = torch.tensor(adapter.kept)
            for name, p in adapter.named_parameters():
                state[f"{path}.{name}.sensitivity"] = self.sensitivity[p]
                state[f"{path}.{name}.uncertainty"] = self.uncertainty[p]
        return state

    def load_state_dict(self, state):
        """What state_dict gave, into an allocator of the same model. Raises ValueError
        where it is not of the same adapters."""
        here = {name: tensor.shape for name, tensor in self.state_dict().items()}
        if here != {name: tensor.shape for name, tensor in state.items()}:
            raise ValueError(
                "this is not the state of an allocator of these layers and ranks"
            )
        self.steps = int(state["steps"])
        for path, adapter in self.adapters.items():
            adapter.kept = state[f"{path}.kept"].tolist()
            for name, p in adapter.named_parameters():
                self.sensitivity[p].copy_(state[f"{path}.{name}.sensitivity"])
                self.uncertainty[p].copy_(state[f"{path}.{name}.uncertainty"])
        self.note()

    def note(self):
        """What is kept, as PEFT's configuration notes it."""
        self.config.rank_pattern = {
            f"{path}.lora_E": a.pruned_pattern() for path, a in self.adapters.items()
        }

    def budget(self, step):
        """The number of triplets that all layers together may keep after `step`
        steps."""
        config = self.config
        first = sum(len(adapter.lora_E) for adapter in self.adapters.values())
        last = config.target_r * len(self.adapters)
        steps = config.total_step - config.tfinal - config.tinit
        rest = min(max(1 - (step - config.tinit) / steps, 0), 1)
        return int((first - last) * rest**3 + last)

    @torch.no_grad()
    def step(self):
        self.steps += 1
        config, step = self.config, self.steps
        end = config.total_step - config.tfinal
        if step < end:
            self.smooth()
        if config.tinit < step <= end and (step % config.deltaT == 0 or step == end):
            self.allocate(self.budget(step))
        elif step > end:  # the choice is final
            self.mask()

    def smooth(self):
        """Update sensitivity and uncertainty from the gradients."""
        beta1, beta2 = self.config.beta1, self.config.beta2
        for p in self.sensitivity:
            now = (p * (0 if p.grad is None else p.grad)).abs()
            self.sensitivity[p].lerp_(now, 1 - beta1)
            self.uncertainty[p].lerp_((now - self.sensitivity[p]).abs(), 1 - beta2)

    def importance(self):
        """{path: the importance of each triplet (r,)}"""

        def score(p):
            return self.sensitivity[p] * self.uncertainty[p]

        scores = {}
        for path, a in self.adapters.items():
            A, E, B = map(score, (a.lora_A, a.lora_E, a.lora_B))
            scores[path] = E[:, 0] + A.mean(1) + B.mean(0)
        return scores

    @torch.no_grad()
    def allocate(self, budget):
        """Prune all but the `budget` most important triplets of all layers."""
        scores = self.importance()
        worst = torch.cat(list(scores.values())).sort().values[:-budget]
        for path, adapter in self.adapters.items():
            adapter.kept = [True] * len(adapter.lora_E)
            if len(worst):
                adapter.kept = (scores[path] > worst[-1]).tolist()
        self.note()
        self.mask()

    @torch.no_grad()
    def mask(self):
        for adapter in self.adapters.values():
            adapter.lora_E[~torch.tensor(adapter.kept)] = 0
