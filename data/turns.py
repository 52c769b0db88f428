"""Which characters of a rendered conversation are its answers: what a model is asked to write there."""

SENTINEL = "\ue0f1{}\ue0f2"  # characters for private use


class Unclear(Exception):
    """An answer that cannot be found in the rendered conversation; the message says why."""


class Marks:
    """The tokenizer's marks (<|im_end|>, ...) inside of text."""

    def __init__(self, marks):
        self.marks = tuple(marks)
        self.longest = max(map(len, self.marks), default=0)

    def without_white_space(self, text, start, end):
        """The end of text[start:end] without the white space that follows a mark at its end."""
        stripped = start + len(text[start:end].rstrip())
        return stripped if text.endswith(self.marks, start, stripped) else end

    def last_end(self, text, end):
        """Where the last mark in text[:end] ends; `end` where there is none."""
        ends = [found + len(mark) for mark in self.marks if (found := text.rfind(mark, 0, end)) >= 0]
        return max(ends, default=end)

    def common(self, first, second):
        """The length of the text that both begin with, no mark of either cut in two."""
        length = common_length(first, second)
        cut = [at for text in (first, second) for at in range(max(0, length - self.longest), length)
               if text.startswith(self.marks, at) and not first.startswith(self.marks, at, length)]
        return min(cut, default=length)


def common_length(first, second):
    """The length of the longest text that both begin with."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def squeezed(text):
    return "".join(text.split())


class Conversation:
    """One conversation and its renderings. `render(messages, add_generation_prompt)` gives text, or raises an error."""

    def __init__(self, render, messages, template, marks):
        self.render, self.messages, self.template, self.marks = render, messages, template, marks
        self.whole = render(messages, False)

    def rendered(self, messages, add_generation_prompt=False):
        """None where the template refuses so short a conversation."""
        try:
            return self.render(messages, add_generation_prompt)
        except MemoryError:
            raise
        except Exception:  # whatever the template does; the whole conversation is fine
            return None

    def answer(self, turn):
        """(start, end) of message number `turn` in the whole text."""
        prompt = self.rendered(self.messages[:turn], True) if turn else None  # no model is asked without a message
        ended = self.whole if turn + 1 == len(self.messages) else self.rendered(self.messages[:turn + 1])
        if prompt is not None and ended is not None and self.whole.startswith(ended) and ended.startswith(prompt):
            start, end = len(prompt), len(ended)
        else:
            start, end = self.rewritten(turn, prompt)
        end = self.marks.without_white_space(self.whole, start, end)
        self.check(self.messages[turn], start, end)
        return start, end

    def rewritten(self, turn, prompt):
        """The same where the template writes a turn, or what surrounds it, in another way once others follow. What
        surrounds the turn is what stays when a word that stands nowhere else takes the turn's place."""
        word = self.word()
        other = [*self.messages[:turn], {"role": "assistant", "content": word}, *self.messages[turn + 1:]]
        before, after = self.around(self.rendered(other), word)
        if not self.whole.endswith(after):
            raise Unclear("the template writes what follows the answer in another way because of the answer")
        start, end = self.start(prompt, before), len(self.whole) - len(after)
        if start > end:
            raise Unclear("the template does not write the answer behind its generation prompt")
        return start, end + self.closing(turn, word, other, after)

    def word(self):
        number = 0
        while SENTINEL.format(number) in self.whole:
            number += 1
        return SENTINEL.format(number)

    def around(self, text, word):
        parts = [] if text is None else text.split(word)
        if len(parts) != 2:
            raise Unclear("the template leaves the answer out, or repeats it")
        return parts

    def start(self, prompt, before):
        """Behind the generation prompt; where that opens more than the conversation holds (a thinking block), behind
        what they share."""
        if prompt is not None and self.whole.startswith(prompt):
            return len(prompt)
        if not self.whole.startswith(before):
            raise Unclear("the template writes what precedes the answer in another way because of the answer")
        if prompt is not None and prompt.startswith(before):
            return len(before)
        asked = self.rendered(self.messages, True) or ""
        header = asked[self.marks.common(asked, self.whole):]
        if not header or not before.endswith(header):
            raise Unclear("the template writes the conversation before the answer in another way once others follow")
        return len(before)

    def closing(self, turn, word, other, after):
        """How much of the text after the answer is the turn's own: what also follows it where the conversation ends."""
        if turn + 1 == len(self.messages):
            return len(after)
        ended = self.rendered(other[:turn + 1])
        parts = [] if ended is None else ended.split(word)
        if len(parts) != 2:
            raise Unclear("the template does not write the conversation up to the answer alone")
        shared = self.marks.common(parts[1], after)
        return shared if shared == len(parts[1]) else self.marks.last_end(after, shared)

    def check(self, message, start, end):
        """Everything that the message says has to stand in the answer, but for white space; what it begins with may
        be what the generation prompt opens."""
        thought = message.get("reasoning_content") if "reasoning_content" in self.template else None
        calls = [call.get("function", call).get("name", "") for call in message.get("tool_calls") or []]
        answer = squeezed(self.whole[start:end])
        for part in map(squeezed, (message.get("content") or "", thought or "", *calls)):
            opened = squeezed(self.whole[max(0, start - 2 * len(part)):start])
            if part and (opened + answer).find(part, max(0, len(opened) - len(part) + 1)) < 0:
                raise Unclear("the template leaves out or rewrites a part of the answer")
