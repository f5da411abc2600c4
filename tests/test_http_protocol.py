"""Goal: whoever has not said who they are can neither fill the memory nor hold a connection for long.

Method: a real service that asks for tokens, and bytes on a socket, for no client sends what these hold.
"""

import socket
import time
from contextlib import closing

import pytest

import flyball_server
from flyball_server import limits

LARGE = limits.HEAD_BYTES_MAX + 1
REQUEST = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(scope="module")
def service():
    with flyball_server.running(auth=True) as service:
        yield service


def opened(service):
    host, port = service.http.removeprefix("http://").split(":")
    return closing(socket.create_connection((host, int(port)), timeout=10))


def said(sock, *pieces):
    """What is answered to these pieces until the service closes the connection."""
    answer = b""
    try:
        for piece in pieces:
            sock.sendall(piece)
            time.sleep(0.01)
        while received := sock.recv(65536):
            answer += received
    except ConnectionError:  # it closed before it was told everything
        pass
    return answer


@pytest.mark.parametrize(
    "pieces",
    [
        [REQUEST + b"X: " + b"a" * LARGE + b"\r\n\r\n"],
        [REQUEST + b"X: a\r\n" * LARGE + b"\r\n"],
        [b"GET /" + b"a" * LARGE + b" HTTP/1.1\r\n\r\n"],
        [REQUEST + b"X: ", *[b"a" * 4096] * 20],
        [REQUEST, *[b"X: aaaa\r\n" * 500] * 20],
        [b"GET /", *[b"a" * 4096] * 20],
        [b"GET /healthz HTTP/1.1\r\n" + b"X" * LARGE],
        [REQUEST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", *[b"X: " + b"a" * 4096] * 20],
    ],
    ids=["field", "fields", "path", "long field", "many fields", "long path", "name", "trailer"],
)
def test_a_head_beyond_the_limit_is_refused_before_it_is_whole(service, pieces):
    with opened(service) as sock:
        answer = said(sock, *pieces)
    # A reset may overtake the answer where much was still on its way.
    assert answer == b"" or b"HTTP/1.1 431 " in answer


def test_a_head_up_to_the_limit_is_taken_in_any_pieces_and_so_are_the_next_ones(service):
    head = REQUEST + b"X: " + b"a" * (limits.HEAD_BYTES_MAX - 100) + b"\r\n\r\n"
    with opened(service) as sock:
        for size in (len(head), 5000, len(head)):
            for i in range(0, len(head), size):
                sock.sendall(head[i : i + size])
            answer = b""
            while not answer.endswith(b'{"status":"ok"}'):
                answer += sock.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")


def test_trailers_do_not_become_fields_and_the_connection_goes_on(service):
    chunked = b"GET /v1/runs HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n"
    secret = service.new_token("viewer").encode()
    with opened(service) as sock:
        sock.sendall(chunked + b"Authorization: Bearer " + secret + b"\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 401 ")
        sock.sendall(REQUEST + b"\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_head_has_its_time_and_a_connection_between_two_requests_has_more(service, monkeypatch):
    monkeypatch.setattr(limits, "HEAD_S", 0.3)
    for begun in (b"", REQUEST):
        with opened(service) as sock:
            sock.sendall(begun)
            assert said(sock).startswith(b"HTTP/1.1 408 ")
    with opened(service) as sock:
        for _ in range(2):
            sock.sendall(REQUEST + b"\r\n")
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
            time.sleep(0.4)
        sock.sendall(REQUEST)
        assert said(sock).startswith(b"HTTP/1.1 408 ")
