"""What tests on a GPU share: masks of a thousand queries, and a skip where a kernel refuses."""

import pytest

from megaarch.attention import causal, choose, full
from tests.attention.cases import prefix, spans

LONG = {
    "prefix of each row": [prefix(p, 1000) for p in (0, 1, 130, 999, 1000)],
    "packed": [[causal(a, b, a, b) for a, b in spans([1, 2, 130, 300, 567])]] * 2,
    "packed prefixes": [
        [part for a, b in spans([200, 300, 500]) for part in prefix((b - a) // 3, b - a, a)]
    ],
    "chat": [[full(0, 100, 0, 100), full(100, 380, 0, 380), full(380, 1000, 0, 1000)]],
}


def skip_if_refused(kernel, q, k, parts, bias=None):
    """A documented limit of a kernel is no failure: it is why the case was skipped."""
    try:
        choose(kernel, q.cuda().requires_grad_(), k.cuda().requires_grad_(), parts, bias)
    except ValueError as refusal:
        pytest.skip(str(refusal))
