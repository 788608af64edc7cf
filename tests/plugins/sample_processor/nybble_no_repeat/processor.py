"""NoRepeat: with extra_args {"no_repeat_ngram": n}, a request never says the same n tokens in a row twice."""

from nybble.plugins.errors import RequestError


class NoRepeat:
    def __init__(self, vocab_size, device):
        pass

    def needs(self, params):
        size = (params.extra_args or {}).get("no_repeat_ngram", 0)
        if type(size) is not int or size < 0:
            raise RequestError("no_repeat_ngram must be a whole number", param="extra_args", found=repr(size))
        return size > 0

    def apply(self, logits, rows):
        for i, row in enumerate(rows):
            logits[i, self.banned(row)] = float("-inf")
        return logits

    @staticmethod
    def banned(row):
        """Every token that followed an earlier occurrence of the last n - 1 tokens."""
        before = row.params.extra_args["no_repeat_ngram"] - 1
        tokens = [*row.prompt_ids.tolist(), *row.output_ids.tolist()]
        last = tokens[len(tokens) - before:]
        return [tokens[i + before] for i in range(len(tokens) - before) if tokens[i:i + before] == last]
