"""A model folder's own tokenizer and chat template, without transformers."""

import json
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.sandbox
from tokenizers import Tokenizer

from environment import BAD_DATA, MISSING_INPUT, fail


class TemplateRefusal(Exception):
    """The chat template cannot render these messages."""


class GenerationTag(jinja2.ext.Extension):
    """Accepts {% generation %} ... {% endgeneration %}; the marks themselves are not needed here."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        fail(MISSING_INPUT, f"{path} does not exist. A Hugging Face model folder is needed: see data/import_gguf.")
    except (OSError, ValueError) as problem:
        fail(BAD_DATA, f"{path} cannot be read as JSON: {problem}. Fetch the model folder again.")


def raise_exception(message):
    raise jinja2.TemplateError(message)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def compile_template(source, now, where):
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(raise_exception=raise_exception, strftime_now=now.strftime)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as problem:
        fail(BAD_DATA, f"{where}: the chat template does not compile: {problem}. Correct the template.")


def template_source(folder, config):
    """The chat template's text, or None. As in transformers, chat_template.jinja comes before the configuration."""
    own_file = folder / "chat_template.jinja"
    if own_file.exists():
        return own_file.read_text(encoding="utf-8")
    source = config.get("chat_template")
    if not isinstance(source, list):
        return source
    named = {entry["name"]: entry["template"] for entry in source}
    if "default" not in named:
        fail(BAD_DATA, f"{folder}/tokenizer_config.json: none of the chat templates {sorted(named)} is named default.")
    return named["default"]


def special_strings(config):
    """bos_token, eos_token, ...: written as a string or as {"content": string}."""
    found = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            found[key] = text
    return found


def load_tokenizer(path):
    if not path.exists():
        fail(MISSING_INPUT, f"{path} does not exist. The tokenizer has to be there in Hugging Face's fast format.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as problem:  # the package raises plain Exception
        fail(BAD_DATA, f"{path} is not a usable tokenizer: {problem}. Fetch the model folder again.")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class ModelTokenizer:
    """Text to token ids and back as the model in `folder` wants it. `now` is the time a template may ask for."""

    def __init__(self, folder, now):
        folder = Path(folder)
        self.path = folder / "tokenizer.json"
        self.tokenizer = load_tokenizer(self.path)
        config = read_json(folder / "tokenizer_config.json")
        self.vocab_size = self.checked_vocab_size(folder / "config.json")
        self.strings = special_strings(config)
        added = self.tokenizer.get_added_tokens_decoder()
        self.special_ids = {token_id for token_id, token in added.items() if token.special}
        self.start_ids = self.special_start()
        source = template_source(folder, config)
        self.template = compile_template(source, now, folder) if source else None

    def checked_vocab_size(self, path):
        size = read_json(path).get("vocab_size")
        highest = max(self.tokenizer.get_vocab(with_added_tokens=True).values())
        if not isinstance(size, int) or highest >= size:
            fail(BAD_DATA, f"{path}: vocab_size is {size}, but {self.path} has token id {highest}. "
                           "Use the tokenizer that belongs to the model.")
        return size

    def special_start(self):
        """What the tokenizer puts before plain text: the beginning-of-sequence token or nothing."""
        bos = self.tokenizer.token_to_id(self.strings.get("bos_token", ""))
        around = self.tokenizer.encode("", add_special_tokens=True).ids
        return [bos] if bos is not None and around[:1] == [bos] else []

    def eos_id(self):
        eos = self.tokenizer.token_to_id(self.strings.get("eos_token", ""))
        if eos is None:
            fail(BAD_DATA, f"{self.path}: the model names no usable eos_token in tokenizer_config.json, "
                           "but plain text has to end with one. Add it there.")
        return eos

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids, skip_special=True):
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special)

    def render(self, messages, add_generation_prompt):
        try:
            return self.template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None,
                **self.strings,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as problem:
            raise TemplateRefusal(f"the model's chat template refuses it: {problem}") from problem
