"""TLS and certificates of clients on both ports, with real certificates made here and real connections.

Goal: who has no certificate of the right authority says nothing and hears nothing. Method: an authority, a
certificate for the service and one for a client, and every way in: REST SDK, both transports of a training
job, and a training job.
"""

import datetime
import ipaddress

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import flyball
import flyball_server
from flyball.api import Client
from flyball.connect import transport
from flyball.errors import FlyballError, LinkError, Refused
from flyball.wire import Attach, Group
from flyball_server.core.errors import Invalid

ATTACH = Attach("default", "r", "s", {}, (Group("a", 0.1, None, None),), {}, None, {}, "absolute", 0, None, False, None,
                None, 0, "", "test")  # fmt: skip


class Authority:
    """Somebody who vouches for others. Files: NAME.pem, NAME.key in its folder."""

    def __init__(self, folder, name):
        self.folder, self.name = folder, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.file = self.write(name, self.key, self.certificate(name, self.key.public_key(), ca=True))[0]

    def certificate(self, name, public, *, ca=False):
        now = datetime.datetime.now(datetime.UTC)
        names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)]))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if not ca:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def issue(self, name):
        """The files of a certificate and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        return self.write(name, key, self.certificate(name, key.public_key()))

    def write(self, name, key, certificate):
        files = self.folder / f"{self.name}-{name}.pem", self.folder / f"{self.name}-{name}.key"
        files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        files[1].write_bytes(key.private_bytes(*form))
        return tuple(map(str, files))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    ours, others = Authority(folder, "ours"), Authority(folder, "others")
    return {
        "ca": ours.file, "others": others.file, "service": ours.issue("service"), "client": ours.issue("client"),
        "stranger": others.issue("stranger"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def service(files):
    cert, key = files["service"]
    with flyball_server.running(auth=True, tls_cert=cert, tls_key=key) as service:
        yield service


@pytest.fixture(scope="module")
def strict(files):
    """The same, for those with a certificate."""
    cert, key = files["service"]
    with flyball_server.running(auth=True, tls_cert=cert, tls_key=key, tls_client_ca=files["ca"]) as service:
        yield service


@pytest.fixture
def trust(monkeypatch):
    """Say in the environment who is trusted, and what is shown."""

    def say(ca="", pair=("", "")):
        for name, value in zip(("CA", "CERT", "KEY"), (ca, *pair), strict=True):
            monkeypatch.setenv(f"FLYBALL_{name}", value)

    return say


def ways(service, token):
    """Every way to ask; each raises where it comes to nothing."""

    def steer(address):
        made = transport(address, token)()
        try:
            return made.attach(ATTACH)
        finally:
            made.close()

    def ask():
        with Client(service.http, token) as client:
            return client.policies()

    return {"sdk": ask, "http": lambda: steer(service.http), "grpc": lambda: steer(service.grpc)}


def outcomes(service, token):
    found = {}
    for name, way in ways(service, token).items():
        try:
            way()
            found[name] = "in"
        except (LinkError, Refused) as error:
            found[name] = type(error)
    return set(found.values())


def test_both_ports_speak_tls_to_who_knows_the_authority(service, files, trust):
    assert (service.http[:8], service.grpc[:8]) == ("https://", "grpcs://")
    trust(files["ca"])
    token = service.new_token("driver")
    assert outcomes(service, token) == {"in"}
    assert outcomes(service, "fb_wrong") == {Refused}
    with Client(service.http, token) as client:
        assert "max-age" in client._http.get("/v1/policies").headers["strict-transport-security"]
    for ca in ("", files["others"]):
        trust(ca)
        assert outcomes(service, token) == {LinkError}


def test_without_tls_nothing_is_answered(service, files, trust, monkeypatch):
    plain = {"http": service.http.replace("https", "http"), "grpc": service.grpc.replace("grpcs", "grpc")}
    trust(files["ca"])
    monkeypatch.setattr(service, "http", plain["http"])
    monkeypatch.setattr(service, "grpc", plain["grpc"])
    assert outcomes(service, service.new_token("driver")) == {LinkError}


def test_where_clients_need_a_certificate_a_token_alone_opens_nothing(strict, files, trust):
    token = strict.new_token("driver")
    for pair in (("", ""), files["stranger"]):
        trust(files["ca"], pair)
        assert outcomes(strict, token) == {LinkError}
    trust(files["ca"], files["client"])
    assert outcomes(strict, token) == {"in"}
    assert outcomes(strict, None) == {Refused}, "and a certificate alone does not, either"


def test_a_connection_that_tls_ends_says_what_to_look_at(strict, files, trust, monkeypatch):
    def hints():
        for way in ways(strict, "fb_token").values():
            with pytest.raises(LinkError) as caught:
                way()
            yield str(caught.value)

    trust(files["ca"])
    assert all("FLYBALL_CERT and FLYBALL_KEY name it" in hint for hint in hints())
    trust(files["others"], files["client"])
    for hint in list(hints())[:2]:  # gRPC does not say why
        assert "FLYBALL_CA names the file" in hint
    monkeypatch.setattr(strict, "http", strict.http.replace("https", "http"))
    monkeypatch.setattr(strict, "grpc", strict.grpc.replace("grpcs", "grpc"))
    assert ["https://" in hint or "grpcs://" in hint for hint in hints()] == [True] * 3


@pytest.mark.parametrize("port", ["http", "grpc"])
def test_a_training_job_is_steered_over_tls(strict, files, trust, port, monkeypatch):
    trust(files["ca"], files["client"])
    monkeypatch.setenv("FLYBALL_TOKEN", strict.new_token("driver") + "\n")
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with flyball.attach(optimizer, run=f"over-{port}", server=getattr(strict, port), start_wait_s=20) as governor:
        for _ in range(5):
            weight.grad = torch.ones(1)
            optimizer.step()
            governor.step(1.0)
    assert governor.status.state != "refused"
    with Client(strict.http) as client:
        assert client.run(f"over-{port}")["observations"] == 5


def test_files_that_are_no_certificates_are_named_and_their_contents_are_not(files, tmp_path, trust):
    junk = tmp_path / "junk.pem"
    junk.write_text("-----BEGIN PRIVATE KEY-----\nhush\n")
    cert, key = files["service"]
    for settings, word in (
        ({"tls_cert": cert, "tls_key": str(junk)}, "junk.pem"),
        ({"tls_cert": cert, "tls_key": files["client"][1]}, "KEY_VALUES_MISMATCH"),
        ({"tls_cert": cert, "tls_key": key, "tls_client_ca": str(junk)}, "tls_client_ca"),
        ({"tls_cert": str(tmp_path / "none"), "tls_key": key}, "tls_cert .*none cannot be read"),
    ):
        with pytest.raises(Invalid, match=word) as caught:
            flyball_server.running(**settings).start()
        assert "hush" not in str(caught.value)
    for ca, pair, word in (
        (str(junk), ("", ""), "FLYBALL_CA"),
        ("/nowhere", ("", ""), "FLYBALL_CA is '/nowhere', which cannot be read"),
        (files["ca"], (cert, str(junk)), "FLYBALL_KEY"),
        (files["ca"], ("", key), "FLYBALL_CERT is not given"),
    ):
        trust(ca, pair)
        for address in ("https://127.0.0.1:1", "grpcs://127.0.0.1:1"):
            with pytest.raises(FlyballError, match=word) as caught:
                transport(address, None)
            assert "hush" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"tls_cert": "c"}, {"tls_key": "k"}, {"tls_client_ca": "a"}])
def test_half_of_tls_is_refused(settings):
    with pytest.raises(ValueError, match="not given"):
        flyball_server.running(**settings)
