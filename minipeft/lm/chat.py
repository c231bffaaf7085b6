"""Conversations as text, by the tokenizer's chat template.

A template is Jinja, as in Hugging Face's tokenizer_config.json. It is somebody else's
program, so it runs in Jinja's sandbox.
"""

import json
from datetime import datetime

ROLES = ("system", "developer", "user", "assistant", "tool")
# "User: ...\nAssistant: ...\n", for a tokenizer that brings no template
PLAIN = """\
{% for message in messages %}
{{ message.role | capitalize }}: {{ message.content }}
{% endfor %}
{% if add_generation_prompt %}Assistant:{% endif %}"""


class ChatError(ValueError):
    """A conversation that a template cannot put into words."""


def render(messages, template=None, add_generation_prompt=False, **special_tokens):
    """Messages -> text, as transformers' apply_chat_template(tokenize=False).

    messages: list of {"role": str, "content": str}. template: Jinja, None for PLAIN.
    add_generation_prompt: end where the assistant's answer begins. special_tokens:
    bos_token, eos_token ... Raises ChatError."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks the assistant's words and changes nothing."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.add_extension(Generation)
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, ensure_ascii=False, **options
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        compiled = environment.from_string(PLAIN if template is None else template)
        inputs = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return compiled.render(**inputs, **special_tokens)
    except Exception as error:  # a template can raise anything
        raise ChatError(f"the chat template refuses it: {error}") from None


def tokens(tokenizer):
    """The arguments of `render` that a tokenizer brings."""
    if tokenizer is None:
        return {}
    names = {}
    for name in ("bos", "eos", "pad"):
        token = getattr(tokenizer, f"{name}_token_id", None)
        if token is not None:
            names[f"{name}_token"] = tokenizer.raw.id_to_token(token)
    return {"template": getattr(tokenizer, "chat_template", None), **names}


def prompt_text(messages, tokenizer=None):
    """The text after which the assistant's answer follows. The bos token, which
    `encode` puts first, is left out."""
    options = tokens(tokenizer)
    text = render(messages, add_generation_prompt=True, **options)
    return text.removeprefix(options.get("bos_token", ""))


def answers(messages, tokenizer=None):
    """[(prompt, completion)], one for each answer of the assistant: a conversation of
    which only the answers are learnt. Raises ChatError."""
    options = tokens(tokenizer)
    pairs = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = prompt_text(messages[:number], tokenizer)
        whole = render(messages[: number + 1], **options)
        whole = whole.removeprefix(options.get("bos_token", ""))
        if not whole.startswith(prompt):
            raise ChatError(
                "the chat template writes an answer in another place than its prompt"
                f" asks for it: {prompt[-60:]!r}"
            )
        # encode puts the end token there
        end = options.get("eos_token", "")
        completion = whole[len(prompt) :].rstrip().removesuffix(end)
        if not completion.strip():
            raise ChatError("an answer is empty")
        pairs.append((prompt, completion))
    if not pairs:
        raise ChatError("no message has the role 'assistant', so nothing is learnt")
    return pairs
