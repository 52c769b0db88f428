"""A model folder's own tokenizer and chat template, as transformers loads and renders them."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from environment import BAD_DATA, MISSING_INPUT, fail, note, read_json, shown
from fingerprint import fingerprint, tokens_of
from templates import TemplateProcess, TemplateRefusal

LARGEST_TOKENIZER = 128 << 20
LARGEST_FILE = 16 << 20
SMALL_FILES = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
               "generation_config.json")
PROBE = "Hello world,\n  two"
REMEDY = "Fetch the model folder again, or correct the file."


def check_files(folder):
    """Sizes and nesting of what transformers will read, and that the tokenizer is there in the fast format."""
    read_json(folder / "config.json", LARGEST_FILE)
    if not (folder / "tokenizer.json").exists():
        fail(MISSING_INPUT, f"{folder / 'tokenizer.json'} does not exist. The tokenizer has to be there in Hugging "
                            "Face's fast format; AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) of "
                            "transformers, with sentencepiece installed, makes it of a tokenizer.model.")
    for name in SMALL_FILES:
        if (folder / name).exists() and control_characters(read_json(folder / name, LARGEST_FILE)):
            fail(BAD_DATA, f"{folder / name}: a key holds control characters. {REMEDY}")
    for path in [folder / "chat_template.jinja", *(folder / "additional_chat_templates").glob("*.jinja")]:
        if path.exists() and (not path.is_file() or path.stat().st_size > LARGEST_FILE):
            fail(BAD_DATA, f"{path} is no file of at most {LARGEST_FILE >> 20} MiB. {REMEDY}")


def control_characters(value):
    """Whether keys below the first level hold some: the libraries print unknown ones as they are."""
    values = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return any(control_characters(inner) or isinstance(inner, dict) and not all(map(str.isprintable, inner))
               for inner in values)


def guarded(folder, what, call):
    """What the library returns. It raises what it likes, a panic of its Rust part included."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as problem:
        reason = f"{type(problem).__name__}: {problem}"
        fail(BAD_DATA, f"{folder}: transformers cannot {what}: {reason}. {REMEDY}")


def load(folder, kind=AutoTokenizer):
    tokenizer = guarded(folder, "load the tokenizer", lambda: kind.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False))
    if not tokenizer.is_fast:
        fail(BAD_DATA, f"{folder}: {type(tokenizer).__name__} is no fast tokenizer. {REMEDY}")
    return tokenizer


def own_file_is_better(tokenizer, path):
    """Whether the class that transformers takes for the model makes another tokenizer of the vocabulary, one that loses
    text, where tokenizer.json as it stands does not."""
    return not keeps_text(tokenizer.backend_tokenizer) and keeps_text(Tokenizer.from_file(str(path)))


def keeps_text(tokenizer):
    return tokenizer.decode(tokenizer.encode(PROBE, add_special_tokens=False).ids).strip() == PROBE


class ModelTokenizer:
    """Text to token ids and back as the model in `folder` wants it. `now` is the time a template may ask for."""

    def __init__(self, folder, now):
        self.folder = Path(folder)
        self.path = self.folder / "tokenizer.json"
        check_files(self.folder)
        self.file = read_json(self.path, LARGEST_TOKENIZER)
        self.tokenizer = load(self.folder)
        if guarded(self.folder, "use the tokenizer", lambda: own_file_is_better(self.tokenizer, self.path)):
            note(f"{type(self.tokenizer).__name__}, which transformers takes for the model, loses text: {self.path} is "
                 "taken as it stands")
            self.tokenizer = load(self.folder, PreTrainedTokenizerFast)
        self.added = {number: token.content for number, token in self.tokenizer.added_tokens_decoder.items()}
        self.vocab_size = self.checked_vocab_size()
        self.unseen = self.unseen_tokens()
        self.stop_ids = self.generation_ends()
        self.start_ids = self.special_start()
        self.sources = self.template_sources()
        self.templates = self.template_process(now) if self.sources else None

    def in_file(self, compute):
        try:
            return compute(self.file)
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            fail(BAD_DATA, f"{self.path} is not a usable tokenizer: {type(problem).__name__}: {problem}. {REMEDY}")

    # ---- what the model knows

    def checked_vocab_size(self):
        path = self.folder / "config.json"
        size = read_json(path, LARGEST_FILE).get("vocab_size")
        highest = max((number for number, _ in self.in_file(tokens_of)), default=0)
        if type(size) is not int or not highest < size < 1 << 31:
            fail(BAD_DATA, f"{path}: vocab_size is {shown(size)}, but {self.path} has token id {highest}. "
                           "Use the tokenizer that belongs to the model.")
        return size

    def unseen_tokens(self):
        """Ids that transformers gives out although the model has never seen them, and why it has not."""
        unseen = {number: f"the token {shown(token)} has id {number}, beyond the model's {self.vocab_size} tokens"
                  for number, token in self.added.items() if number >= self.vocab_size}
        known = {token for _, token in self.in_file(tokens_of)} | self.numbered_elsewhere()
        for name in ("bos_token", "eos_token"):
            token, number = getattr(self.tokenizer, name), getattr(self.tokenizer, f"{name}_id")
            if token is not None and str(token) not in known:
                unseen[number] = f"{name} is {shown(token)}, which no vocabulary of the folder holds"
        return unseen

    def numbered_elsewhere(self):
        """Tokens to which tokenizer_config.json or added_tokens.json give an id."""
        files = [self.folder / name for name in ("tokenizer_config.json", "added_tokens.json")]
        config, added = (read_json(path, LARGEST_FILE) if path.exists() else {} for path in files)
        return {token["content"] for token in config.get("added_tokens_decoder", {}).values()} | set(added)

    def generation_ends(self):
        """Token ids that end an answer: eos_token_id of generation_config.json, else of config.json; the tokenizer's."""
        own = self.tokenizer.eos_token_id
        ends = set() if own is None or own in self.unseen else {own}
        for name in ("generation_config.json", "config.json"):
            path = self.folder / name
            named = read_json(path, LARGEST_FILE).get("eos_token_id") if path.exists() else None
            if named is not None:
                return ends | self.checked_ends(path, named if isinstance(named, list) else [named])
        return ends

    def checked_ends(self, path, ids):
        for number in ids:
            if type(number) is not int or not 0 <= number < self.vocab_size:
                fail(BAD_DATA, f"{path}: eos_token_id holds {shown(number)}, which is no token id below vocab_size "
                               f"{self.vocab_size}. Correct the file.")
        return set(ids)

    def check_seen(self, ids):
        found = next((number for number in ids if number in self.unseen), None) if self.unseen else None
        if found is not None:
            fail(BAD_DATA, f"{self.folder}: {self.unseen[found]}: the model has never seen it. Correct the tokenizer's "
                           "files, or use the tokenizer that belongs to the model.")

    # ---- text and ids

    def special_start(self):
        """What the tokenizer puts before plain text: the beginning-of-sequence token or nothing."""
        bos = self.tokenizer.bos_token_id
        around = self.tokenizer.backend_tokenizer.encode("", add_special_tokens=True).ids
        return [bos] if bos is not None and around[:1] == [bos] else []

    def eos_id(self):
        eos = self.tokenizer.eos_token_id
        if eos is None:
            fail(BAD_DATA, f"{self.path}: the model names no usable eos_token in tokenizer_config.json, "
                           "but plain text has to end with one. Add it there.")
        self.check_seen([eos])
        return eos

    def encode(self, text):
        """The ids of the text alone, and the characters (start, end) that each stands for."""
        encoded = guarded(self.folder, "use the tokenizer", lambda: self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True))
        self.check_seen(encoded["input_ids"])
        return encoded["input_ids"], encoded["offset_mapping"]

    def encode_plain(self, text):
        """The same for text that is no conversation: behind the beginning-of-sequence token, where the tokenizer puts
        one and the text does not begin with it."""
        ids, offsets = self.encode(text)
        first = next((i for i, (_, end) in enumerate(offsets) if text[:end].strip()), len(ids))
        if self.start_ids and ids[first:first + 1] != self.start_ids:
            return self.start_ids + ids, [(0, 0), *offsets]
        return ids, offsets

    def decode(self, ids, skip_special=True):
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special)

    def fingerprints(self):
        """Of tokenizer.json as it stands, and of the tokenizer as transformers made it of all of the folder's files."""
        return self.in_file(fingerprint), fingerprint(json.loads(self.tokenizer.backend_tokenizer.to_str()))

    # ---- conversations

    def template_sources(self):
        """The chat template's text, by whether tools are given; nothing where the model has none."""
        try:
            if not self.tokenizer.chat_template:
                return {}
            sources = {tools: self.tokenizer.get_chat_template(tools=[{}] if tools else None)
                       for tools in (False, True)}
        except ValueError as problem:
            fail(BAD_DATA, f"{self.folder}: {problem}")
        if not all(isinstance(source, str) for source in sources.values()):
            fail(BAD_DATA, f"{self.folder}: chat_template is no text. {REMEDY}")
        return sources

    def template_process(self, now):
        marks = {token for token in (*self.added.values(), *self.tokenizer.all_special_tokens) if token.strip()}
        process = TemplateProcess(marks, self.tokenizer.special_tokens_map, now)
        try:
            for source in set(self.sources.values()):
                process.compile(source)
        except TemplateRefusal as problem:
            fail(BAD_DATA, f"{self.folder}: the chat template does not compile: {problem}. Correct the template.")
        return process

    def reads(self, key, tools=False):
        """Whether the chat template speaks of a key."""
        return key in self.sources[tools]

    def prompt(self, messages):
        """The text that asks for the next answer."""
        return self.templates.prompt(self.sources[False], messages, {})

    def conversation(self, messages, options, first):
        return self.templates.conversation(self.sources[bool(options.get("tools"))], messages, options, first)
