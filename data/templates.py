"""Renders chat templates. They are programs that came with a model, so they run in a process of their own, with limits
on its time and memory. What renders is transformers itself."""

import json
import multiprocessing
import re
import resource
import signal

from transformers.utils.chat_template_utils import render_jinja_template

from environment import BAD_DATA, fail
from turns import Conversation, Marks, Unclear

CPU_SECONDS = 10  # for one conversation
WALL_SECONDS = 60
MEMORY_BYTES = 2 << 30  # beyond what the process holds when it begins
LONGEST_TEXT = 64 << 20
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TemplateRefusal(Exception):
    """The chat template cannot render these messages."""


class TemplateProcess:
    """The process. It ends with this one, and is never started again: a template that runs away ends the run."""

    def __init__(self, marks, variables, now):
        context = multiprocessing.get_context("fork")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, self.pipe, marks, variables, now), daemon=True)
        self.process.start()
        other.close()

    def ask(self, job):
        try:
            self.pipe.send_bytes(json.dumps(job).encode())
            if not self.pipe.poll(WALL_SECONDS):
                self.process.kill()
            answer = json.loads(self.pipe.recv_bytes())
        except RecursionError as problem:
            raise TemplateRefusal("the messages are nested too deeply") from problem
        except (EOFError, OSError):
            self.process.join()
            fail(BAD_DATA, f"the model's chat template did not come to an end within {CPU_SECONDS} s, or broke down "
                           f"(exit {self.process.exitcode}). Correct the template, or split the conversation.")
        if "refused" in answer:
            raise TemplateRefusal(f"the model's chat template refuses it: {answer['refused']}")
        return answer

    def compile(self, template):
        self.ask({"template": template})

    def prompt(self, template, messages, options):
        """The text that asks for an answer."""
        return self.ask({"template": template, "messages": messages, "options": options, "prompt": True})["text"]

    def conversation(self, template, messages, options, first):
        """{"text", "answers": [(start, end)], "marked", "unclear": [why]}: the answers from message `first` on."""
        return self.ask({"template": template, "messages": messages, "options": options, "first": first})


# ---- inside of the process


def serve(pipe, other_end, marks, variables, now):
    other_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit_memory()
    variables = {**variables, "strftime_now": now.strftime}
    marks = Marks(marks)
    while True:
        try:
            job = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        limit_time()
        pipe.send_bytes(answer_to(job, marks, variables))


def limit_memory():
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_AS, held + MEMORY_BYTES)


def limit_time():
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + CPU_SECONDS)


def limit(kind, amount):
    """Within what the system allows this process already."""
    highest = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (amount if highest == resource.RLIM_INFINITY else min(amount, highest), highest))


def answer_to(job, marks, variables):
    try:
        return json.dumps(do(job, marks, variables)).encode()
    except MemoryError:
        reason = f"it needs more than {MEMORY_BYTES >> 30} GiB of memory"
    except Exception as problem:  # whatever a template brings about
        reason = f"{type(problem).__name__}: {str(problem)[:1000]}"
    return json.dumps({"refused": reason}).encode()


def do(job, marks, variables):
    template = job["template"]

    def render(messages, add_generation_prompt, mask=False):
        texts, spans = render_jinja_template([messages], chat_template=template, return_assistant_tokens_mask=mask,
                                             add_generation_prompt=add_generation_prompt,
                                             **{**variables, **job["options"]})
        if len(texts[0]) > LONGEST_TEXT:
            raise ValueError(f"it makes more than {LONGEST_TEXT:,} characters of the conversation")
        return (texts[0], spans[0]) if mask else texts[0]

    if "messages" not in job:
        render_jinja_template([], chat_template=template)
        return {}
    if "prompt" in job:
        return {"text": render(job["messages"], True)}
    if GENERATION.search(template):
        return marked(render, job["messages"], job["first"], marks)
    return found(Conversation(render, job["messages"], template, marks), job["first"])


def marked(render, messages, first, marks):
    """The answers as {% generation %} marks them."""
    text, spans = render(messages, False, mask=True)
    begin = marks.common(render(messages[:first], True), text) if first else 0
    return {"text": text, "answers": [span for span in spans if span[0] >= begin], "marked": True, "unclear": []}


def found(conversation, first):
    """The answers where the template does not mark them."""
    answers, unclear = [], []
    for turn, message in enumerate(conversation.messages):
        if turn >= first and message["role"] == "assistant" and message.get("weight") != 0:
            try:
                answers.append(conversation.answer(turn))
            except Unclear as reason:
                unclear.append(f"message {turn + 1}: {reason}")
    return {"text": conversation.whole, "answers": answers, "marked": False, "unclear": unclear}
