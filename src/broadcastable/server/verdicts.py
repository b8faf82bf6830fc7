"""Verified tokens, remembered until they expire, so that a reader who comes back costs no second verification."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from broadcastable.errors import ExpiredToken
from broadcastable.tokens import LEEWAY, Gatekeeper


class Verdicts:
    """The claims of good tokens, at most *most* of them; the one longest unused goes first. Not thread safe.

    Refused tokens are not kept: anybody can send any number of those.
    """

    def __init__(self, gatekeeper: Gatekeeper, most: int) -> None:
        self._gatekeeper = gatekeeper
        self._most = most
        self._claims: OrderedDict[str, Mapping[str, Any]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._claims)

    def claims_of(self, token: str) -> Mapping[str, Any]:
        """See `Gatekeeper.decode`, which is asked once a token.

        Raises:
            TokenError: Whatever `decode` found wrong, or the token has expired since.
        """
        claims = self._claims.get(token)
        if claims is None:
            claims = self._gatekeeper.decode(token)
            self._claims[token] = claims
            if len(self._claims) > self._most:
                self._claims.popitem(last=False)
        elif claims["exp"] + LEEWAY <= time.time():
            del self._claims[token]
            raise ExpiredToken("The token has expired: fetch a new one")
        else:
            self._claims.move_to_end(token)
        return claims


def seconds_left(claims: Mapping[str, Any]) -> float:
    """How long a response to the bearer of *claims* may go on: until `exp`.

    A token that is accepted on the leeway alone has the rest of the leeway; if its reader were cut off at once, it
    would come back at once.
    """
    left: float = claims["exp"] - time.time()
    return left if left > 0 else max(0.0, left + LEEWAY)
