"""The gatekeeper's rules as a Caddyfile, for the production stream server: Caddy with two modules.

`durable_streams` keeps the streams, `jwtauth` verifies tokens. The latter only verifies; what a token lets its bearer
do is compared here, by the same rules as in `GatekeeperMiddleware`. Pure: text in, text out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from broadcastable.errors import ConfigurationError
from broadcastable.names import MAX_NAME_LENGTH
from broadcastable.tokens import MAX_TOKEN_LENGTH

from .gatekeeper import MAX_BODY
from .origins import EXPOSED, PREFLIGHT_SECONDS, REQUEST_HEADERS, Origins

MOUNT = "/v1/streams"
MODULES = (
    "github.com/durable-streams/durable-streams/packages/caddy-plugin",
    "github.com/ggicci/caddy-jwt",
)
"""What Caddy is built with: `xcaddy build --with ...`."""

_ADDRESS = re.compile(r"[A-Za-z0-9.\-:\[\]*]+")


@dataclass(frozen=True, kw_only=True)
class CaddySite:
    """What the Caddyfile is made from.

    Attributes:
        domain: The public host name, for which Caddy gets a certificate; None listens on *port* without TLS.
        port: The port when there is no domain, or one besides 443.
        tls: "auto" (a public certificate), "internal" (Caddy's own authority), "off" (behind another proxy), or the
            paths of a certificate and its key.
        data_dir: Where the streams are kept; None keeps them in memory.
        issuer: `Settings.token_issuer`.
        audience: `Settings.token_audience`.
        origins: Origins of pages that may call, or `*`.
        jwks_port: A port of the loopback interface on which Caddy tells itself the public keys.
    """

    domain: str | None = None
    port: int | None = None
    tls: str | tuple[str, str] = "auto"
    data_dir: str | None = None
    issuer: str = "broadcastable"
    audience: str | None = None
    origins: Sequence[str] = ()
    jwks_port: int = 4438

    def __post_init__(self) -> None:
        if self.domain is None and self.port is None:
            raise ConfigurationError("The stream server needs a domain, such as streams.example.com, or a port")
        if self.domain is not None and not _ADDRESS.fullmatch(self.domain):
            raise ConfigurationError(f"domain is a host name such as streams.example.com; got {self.domain!r}")
        for port in (self.port, self.jwks_port):
            if port is not None and not 1 <= port <= 65_535:
                raise ConfigurationError(f"A port is between 1 and 65535; got {port}")
        Origins(self.origins)

    @property
    def address(self) -> str:
        """Caddy's address of the site."""
        host = self.domain or ""
        port = f":{self.port}" if self.port is not None else ""
        plain = self.tls == "off" or self.domain is None
        return f"http://{host}{port}" if plain else f"{host}{port}"


def caddyfile(site: CaddySite, jwks: Mapping[str, Any]) -> str:
    """The Caddyfile of *site*, for tokens signed with a key in *jwks* (see `Gatekeeper.jwks`).

    What the middleware does and this cannot, for want of it in the two modules, is in the documentation, page
    Deployment. None of it lets anybody in without a token that our key has signed.

    Raises:
        ConfigurationError: No key, or a text that would break out of its place in the file.
    """
    if not jwks.get("keys"):
        raise ConfigurationError("There is no public key to verify tokens with. Make one: broadcastable keys generate")
    parts = [_HEAD, _keys_site(site, jwks), f"{site.address} {{", *map(_indented, _tls(site)), _indented(_LOG)]
    parts += [_indented(f"route {{\n{_indented(_route(site))}\n}}"), "}"]
    return "\n".join(parts) + "\n"


_HEAD = f"""\
# Made by `broadcastable caddyfile`; make it again when keys or broadcastable.toml change.
# For a Caddy that is built with both modules:
#   xcaddy build --with {MODULES[0]} --with {MODULES[1]}
{{
	admin off
}}
"""

_LOG = """\
# Tokens stay out of the log.
log {
	format filter {
		wrap json
		fields {
			request>uri query {
				delete token
			}
			request>headers>Authorization delete
		}
	}
}"""


def _keys_site(site: CaddySite, jwks: Mapping[str, Any]) -> str:
    text = json.dumps(jwks, separators=(",", ":"))
    if "`" in text:
        raise ConfigurationError("A kid with a backtick cannot stand in a Caddyfile; set signing_kid")
    return f"""\
# The public keys, told to this Caddy alone: a key set pins the algorithm and can hold several keys, for rotation.
http://127.0.0.1:{site.jwks_port} {{
	bind 127.0.0.1
	header Content-Type application/json
	respond /jwks.json `{text}` 200
	respond 404
}}
"""


def _tls(site: CaddySite) -> list[str]:
    if isinstance(site.tls, tuple):
        return [f"tls {_quoted(site.tls[0])} {_quoted(site.tls[1])}"]
    if site.tls not in {"auto", "internal", "off"}:
        raise ConfigurationError(
            f'tls is "auto", "internal", "off", or the paths of a certificate and a key; got {site.tls!r}'
        )
    return ["tls internal"] if site.tls == "internal" else []


def _route(site: CaddySite) -> str:
    return "\n\n".join(
        part
        for part in (
            f"@elsewhere expression `!{{http.request.uri}}.startsWith('{MOUNT}/')`\nrespond @elsewhere 404",
            _cors(site),
            _ONE_TOKEN,
            _jwtauth(site),
            _NAMES,
            _RIGHTS,
            _BODY,
            _OUR_HEADERS,
            _durable_streams(site),
        )
        if part
    )


def _cors(site: CaddySite) -> str:
    preflight = (
        "@preflight {\n\tmethod OPTIONS\n\theader Origin *\n\theader Access-Control-Request-Method *\n}\n"
        "respond @preflight 403"
    )
    origins = Origins(site.origins).allowed
    if not origins:
        return f"# No page of another origin may call: see `origins` in broadcastable.toml.\n{preflight}"
    everyone = "*" in origins
    headers = f"""\
header @page {{
	Access-Control-Allow-Origin {_quoted("*" if everyone else "{http.request.header.Origin}")}
	Access-Control-Expose-Headers {_quoted(EXPOSED)}"""
    let_in = "header Origin *" if everyone else "\n".join(f"header Origin {_quoted(each)}" for each in origins)
    return f"""\
@page {{
{_indented(let_in)}
}}
# Twice: at once, for the 401 of jwtauth, which takes no part in what is deferred; and over what durable_streams says.
{headers}
}}
{headers}
	defer
}}
header Vary Origin
@preflight_of_page {{
	method OPTIONS
	header Access-Control-Request-Method *
{_indented(let_in)}
}}
header @preflight_of_page {{
	Access-Control-Allow-Methods "GET, HEAD, POST"
	Access-Control-Allow-Headers {_quoted(REQUEST_HEADERS)}
	Access-Control-Max-Age {PREFLIGHT_SECONDS}
}}
respond @preflight_of_page 204
{preflight}"""


def _any(*conditions: str) -> str:
    return " || ".join(conditions)


_QUERY = "{http.request.uri.query}"
_AMBIGUOUS = _any(
    f"{_QUERY}.matches('(^|&)token(=[^&]*)?&(.*&)?token(=|&|$)')",
    f"{_QUERY}.matches('(^|&)[^=&]*%[^=&]*(=|&|$)')",
    "{http.request.header.Authorization}.contains(',')",  # two headers of that name are joined by a comma
)
_TOO_LONG = _any(
    f"size({_QUERY}) > {MAX_TOKEN_LENGTH + 1024}",
    f"size({{http.request.header.Authorization}}) > {MAX_TOKEN_LENGTH + 8}",
)
_ONE_TOKEN = f"""\
# One token, in one place (RFC 6750, 2); and of a size that is worth reading.
@two_tokens {{
	header Authorization *
	expression `{_QUERY}.matches('(^|&)token(=|&|$)')`
}}
respond @two_tokens 400
@ambiguous expression `{_AMBIGUOUS}`
respond @ambiguous 400
@too_long expression `{_TOO_LONG}`
respond @too_long 401"""


def _jwtauth(site: CaddySite) -> str:
    lines = [
        f"jwk_url http://127.0.0.1:{site.jwks_port}/jwks.json",
        "from_query token",
        f"issuer_whitelist {_quoted(site.issuer)}",
    ]
    if site.audience is not None:
        lines.append(f"audience_whitelist {_quoted(site.audience)}")
    # The user is the issuer: a server token names no stream, and every token has one.
    lines += ["user_claims iss", 'meta_claims "stream" "permissions" "server"']
    return "# 401: unless one of our keys signed it, it is of our issuer, and it is within its time.\n" + _block(
        "jwtauth", lines
    )


_PATH = "{http.request.uri.path}"
# In a text of CEL, for a regular expression of RE2; what is not UTF-8 counts as U+FFFD.
_NOT_IN_A_NAME = r"[[:cntrl:]\u0080-\u009f\ufffd?#\\\\]"
_IMPOSSIBLE = _any(
    f"!{_PATH}.matches('^{MOUNT}/(gid://|[^/]+/)*[^/]+$')",
    f"{_PATH}.matches('/[.][.]?(/|$)')",
    f"{_PATH}.matches('^{MOUNT}/__ds(/|$)')",
    f"{_PATH}.matches('{_NOT_IN_A_NAME}')",
    f"size({_PATH}) > {len(MOUNT) + 1 + MAX_NAME_LENGTH}",
)
_NAMES = f"""\
# 400: what no stream can be called. The path is compared as it is after one percent-decoding.
@impossible expression `{_IMPOSSIBLE}`
respond @impossible 400"""

_ITS_STREAM = f"{_PATH} == '{MOUNT}/' + {{http.auth.user.stream}}"
_RIGHTS = f"""\
# 403: a client's token is for one stream, reads with "read" and writes with "write"; all else is for the server's own.
@refused {{
	not {{
		expression `{{http.auth.user.server}} == 'true'`
	}}
	not {{
		method GET HEAD
		expression `{_ITS_STREAM} && {{http.auth.user.permissions}}.matches('(^|,)read(,|$)')`
	}}
	not {{
		method POST
		header !Stream-Closed
		expression `{_ITS_STREAM} && {{http.auth.user.permissions}}.matches('(^|,)write(,|$)')`
	}}
}}
respond @refused 403"""


_BODY = f"""\
request_body {{
	max_size {MAX_BODY >> 20}MiB
}}"""
# Deferred headers are set from the last in the file to the first, so what a page is told by the first is not deleted.
_OUR_HEADERS = """\
# durable_streams lets every page call, and shared caches keep what they would give to others without a token.
header {
	-Access-Control-*
	Cache-Control public private
	defer
}"""


def _durable_streams(site: CaddySite) -> str:
    lines = [] if site.data_dir is None else [f"data_dir {_quoted(site.data_dir)}"]
    return _block("durable_streams", [*lines, "long_poll_timeout 30s", "sse_reconnect_interval 60s"])


def _block(name: str, lines: Sequence[str]) -> str:
    return f"{name} {{\n{_indented(chr(10).join(lines))}\n}}"


def _quoted(text: str) -> str:
    if any(c in text for c in '"`\\\n\r') or text.endswith(" "):
        raise ConfigurationError(f"{text!r} cannot stand in a Caddyfile: it holds a quote, a backslash or a line end")
    return f'"{text}"'


def _indented(text: str) -> str:
    return "\n".join(f"\t{line}" if line else line for line in text.split("\n"))
