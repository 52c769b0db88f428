"""What a line of the input says: a conversation, or a prompt with its completion.

A record is one of
  messages                          a list of {"role", "content"}
  conversations                     the same, or ShareGPT's {"from", "value"}
  prompt + completion               two texts, or two lists of messages, of which the second is learnt
  instruction + output (+ input)    one question and its answer
  text                              all of it is learnt
Beside messages, tools (a list, or the same as JSON text) and chat_template_kwargs (an object) go to the chat template,
as every key of a message does; an answer of weight 0 is not learnt. All other columns are left out, and named at the
end, text too where it stands beside another kind, of which it is a rendering. Any other record of two kinds is refused.
A column that is null counts as absent."""

import json
import re
from dataclasses import dataclass, field

from environment import shown

KINDS = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"), ("text",))
BESIDE = {("instruction", "output"): ("input",), ("messages",): ("tools", "chat_template_kwargs"),
          ("conversations",): ("tools", "chat_template_kwargs"),
          ("prompt", "completion"): ("tools", "chat_template_kwargs")}
KNOWN = "messages, conversations, prompt + completion, instruction + output (+ input), and text"
ROLES = ("system", "developer", "user", "assistant", "tool", "ipython", "function")
SHAREGPT = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
            "function_call": "assistant", "tool": "tool", "observation": "tool", "function": "tool"}
ODD = re.compile("[\0\ud800-\udfff]")
FIXED = ("messages", "conversations", "tools", "documents", "chat_template", "add_generation_prompt",
         "continue_final_message", "return_assistant_tokens_mask")


class BadRecord(Exception):
    """A record that cannot become a sample; the message says why."""


@dataclass
class Text:
    """`completion` is to be learnt."""

    prompt: str
    completion: str


@dataclass
class Chat:
    """The answers from message `first` on are to be learnt; `options` are the template's variables."""

    messages: list
    first: int = 0
    options: dict = field(default_factory=dict)


@dataclass
class Instruction:
    instruction: str
    input: str
    output: str


# ---- from a line to an object


def no_repeats(pairs):
    record = dict(pairs)
    if len(record) != len(pairs):
        raise BadRecord("a key stands twice in one object")
    return record


def no_constant(name):
    raise BadRecord(f"{name} is not JSON")


def parse_json(text):
    try:
        return json.loads(text, object_pairs_hook=no_repeats, parse_constant=no_constant)
    except (ValueError, RecursionError) as problem:
        raise BadRecord(f"not a JSON object in UTF-8: {problem}") from problem


def parse(raw):
    """The record in a line, and the names of the columns that are left out."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise BadRecord(f"not a JSON object in UTF-8: {problem}") from problem
    columns = parse_json(text)
    if not isinstance(columns, dict):
        raise BadRecord("not a JSON object")
    columns = {key: value for key, value in columns.items() if value is not None}
    kinds = [kind for kind in KINDS if all(key in columns for key in kind)]
    if len(kinds) == 2 and kinds[1] == ("text",):
        kinds.pop()
    if len(kinds) != 1:
        problem = "it is of more than one kind" if kinds else "it is of no known kind"
        raise BadRecord(f"{problem}: its keys are {shown(', '.join(columns))}; known records are {KNOWN}")
    used = {key: columns.pop(key) for key in (*kinds[0], *BESIDE.get(kinds[0], ())) if key in columns}
    return READERS[kinds[0]](used), list(columns)


# ---- texts


def checked_text(value, name, needed=True):
    if not isinstance(value, str):
        raise BadRecord(f"{name} is not a string")
    if needed and not value:
        raise BadRecord(f"{name} is empty")
    if ODD.search(value):
        raise BadRecord(f"{name} contains a zero character or half a surrogate pair")
    return value


def checked_values(value, name):
    """Objects and lists that go to the template as they are."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise BadRecord(f"{name} is nested too deeply") from None
    if ODD.search(text) or "\\u0000" in text:
        raise BadRecord(f"{name} contains a zero character or half a surrogate pair")
    return value


def read_text(columns):
    return Text("", checked_text(columns["text"], "text"))


def read_instruction(columns):
    return Instruction(checked_text(columns["instruction"], "instruction"),
                       checked_text(columns.get("input", ""), "input", needed=False),
                       checked_text(columns["output"], "output"))


def read_pair(columns):
    prompt, completion = columns["prompt"], columns["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = [checked_message(message) for message in (*prompt, *completion)]
        return Chat(messages, len(prompt), template_options(columns))
    return Text(checked_text(prompt, "prompt", needed=False), checked_text(completion, "completion"))


# ---- conversations


def read_messages(columns):
    messages = columns["messages"] if "messages" in columns else columns["conversations"]
    name = "messages" if "messages" in columns else "conversations"
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise BadRecord(f"{name} is not a list of objects")
    return Chat([checked_message(message) for message in messages], 0, template_options(columns))


def template_options(columns):
    options = columns.get("chat_template_kwargs", {})
    if not isinstance(options, dict) or any(name in options for name in FIXED):
        raise BadRecord(f"chat_template_kwargs is no object, or holds one of {', '.join(FIXED)}")
    tools = columns.get("tools")
    tools = parse_json(tools) if isinstance(tools, str) and tools.strip() else tools
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRecord("tools is not a list of objects")
    return checked_values({**options, **({"tools": tools} if tools else {})}, "tools or chat_template_kwargs")


def checked_message(message):
    if not isinstance(message, dict):
        raise BadRecord("a message is not an object")
    if set(message) >= {"from", "value"}:
        message = from_sharegpt(message)
    message = {key: value for key, value in message.items() if value is not None or key == "content"}
    if "role" not in message or not {"content", "tool_calls"} & set(message):
        raise BadRecord(f"a message has the keys {shown(', '.join(message))}; role and content are needed")
    if message["role"] not in ROLES:
        raise BadRecord(f"the role {shown(message['role'])} is none of {', '.join(ROLES)}")
    if type(message.get("weight", 1)) not in (int, float) or message.get("weight", 1) not in (0, 1):
        raise BadRecord(f"weight is {shown(message['weight'])}, and an answer is learnt (1) or not (0)")
    calls = checked_calls(message)
    if not calls or message.get("content") is not None:
        message["content"] = joined(message.get("content"))
        checked_text(message["content"], "content", needed=message["role"] == "assistant" and not calls)
    return checked_values(message, "a message")


def joined(content):
    """A message's text; of a list of parts, their texts together."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise BadRecord(f"a part of the content is of type {shown(kind)}; only text can be trained on")
    return "".join(part["text"] for part in content)


def checked_calls(message):
    calls = message.get("tool_calls") or []
    functions = [call.get("function", call) for call in calls if isinstance(call, dict)]
    named = [isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions]
    if not isinstance(calls, list) or len(functions) != len(calls) or not all(named):
        raise BadRecord("tool_calls is not a list of {\"function\": {\"name\", \"arguments\"}}")
    return calls


def from_sharegpt(message):
    """{"from", "value"} as {"role", "content"}; a call of a function as tool_calls."""
    speaker = message["from"]
    if not isinstance(speaker, str) or speaker not in SHAREGPT:
        raise BadRecord(f"from is {shown(speaker)}, none of {', '.join(SHAREGPT)}")
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    if speaker != "function_call":
        return {"role": SHAREGPT[speaker], "content": message["value"], **others}
    call = parse_json(checked_text(message["value"], "value"))
    calls = call if isinstance(call, list) else [call]
    calls = [{"type": "function", "function": call} for call in calls]
    return {"role": "assistant", "content": "", "tool_calls": calls, **others}


READERS = {("messages",): read_messages, ("conversations",): read_messages, ("prompt", "completion"): read_pair,
           ("instruction", "output"): read_instruction, ("text",): read_text}
