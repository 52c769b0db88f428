"""Renders chat templates. They are programs that came with a model, so they run in a process of their own, with limits
on its time and memory. What renders is transformers itself."""

import json
import multiprocessing
import re
import resource
import signal

from transformers.utils.chat_template_utils import render_jinja_template

from turns import Conversation, Marks, Unclear

CPU_SECONDS, WALL_SECONDS = 10, 60  # for one conversation
MESSAGES_A_SECOND = 10  # of a long one, for more: every part that it begins with is rendered
MEMORY_BYTES = 2 << 30  # beyond what the process holds when it begins
LONGEST_TEXT = 64 << 20
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TemplateRefusal(Exception):
    """The chat template cannot render these messages."""


class TemplateProcess:
    """The process. It ends with this one; after a template that ran away it is started again."""

    def __init__(self, marks, variables, now):
        self.settings = marks, variables, now
        self.start()

    def start(self):
        context = multiprocessing.get_context("fork")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, self.pipe, *self.settings), daemon=True)
        self.process.start()
        other.close()

    def ask(self, job):
        more = len(job.get("messages", ())) // MESSAGES_A_SECOND
        try:
            self.pipe.send_bytes(json.dumps({**job, "seconds": CPU_SECONDS + more}).encode())
            if not self.pipe.poll(WALL_SECONDS + more):
                self.process.kill()
            answer = json.loads(self.pipe.recv_bytes())
        except RecursionError as problem:
            raise TemplateRefusal("the messages are nested too deeply") from problem
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            self.start()
            raise TemplateRefusal(f"the model's chat template did not come to an end within {CPU_SECONDS + more} s, or "
                                  f"broke down (exit {code}); correct the template, or split the conversation") from None
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
        limit_time(job["seconds"])
        pipe.send_bytes(answer_to(job, marks, variables))


def limit_memory():
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_AS, held + MEMORY_BYTES)


def limit_time(seconds):
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + seconds)


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
    answers = [message for message in messages if message["role"] == "assistant"]
    if any(message.get("weight") == 0 for message in answers):
        if len(spans) != len(answers):
            raise ValueError("an answer has weight 0, and the template marks more or fewer parts than there are answers")
        spans = [span for span, message in zip(spans, answers) if message.get("weight") != 0]
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
