"""`make demo`: LoRA in about a minute. What the model says before, the training, what it says after, and what that cost."""
import torch

from .. import LoraConfig, get_peft_model
from ..lm import evaluate, generate, load_data, load_pretrained, load_tokenizer, train


def main(task="sql", r=8, steps=200, lr=1e-2, shown=4, limit=100):
    torch.manual_seed(0)
    tokenizer, data = load_tokenizer(), load_data(task)
    model = get_peft_model(load_pretrained(), LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear"))
    examples = data.test[:shown]
    prompts = [example.prompt for example in examples]
    print(f"Task {task!r}: {data.description}.\nA LoRA of rank {r} on every linear layer of a frozen base:")
    model.print_trainable_parameters()
    before, score_before = generate(model, tokenizer, prompts, 40), evaluate(model, tokenizer, data, limit=limit)[data.metric]
    history = train(model, data, tokenizer=tokenizer, steps=steps, lr=lr, warmup=10)
    after, score_after = generate(model, tokenizer, prompts, 40), evaluate(model, tokenizer, data, limit=limit)[data.metric]
    for example, old, new in zip(examples, before, after):
        print("\n" + example.prompt)
        for label, text in (("before", old), ("after", new), ("wanted", example.completion)):
            print(f"  {label:7} {' '.join(text.split())[:110]}")
    trained, everything = model.get_nb_trainable_parameters()
    rows = [("", "before", "after"), (f"{data.metric}, {limit} test questions", f"{score_before:.0f}", f"{score_after:.0f}"),
            ("loss of a token", f"{history.losses[0]:.2f}", f"{sum(history.losses[-10:]) / 10:.2f}"),
            ("trained parameters", "", f"{trained:,} of {everything:,}"), ("the adapter's file", "", f"{4 * trained / 1e6:.2f} MB"),
            ("training", "", f"{history.seconds:.0f} s, {history.tokens_per_second:,.0f} tokens/s")]
    print("\n" + "\n".join(f"{a:32} {b:>10} {c:>24}" for a, b, c in rows))


if __name__ == "__main__":
    main()
