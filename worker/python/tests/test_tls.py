"""Every way into a server that speaks mutual TLS: the clients in pure Python, the native worker, a model's
cache. Certificates are made on the spot by the openssl program."""

import asyncio
import pathlib
import shutil
import subprocess

import numpy as np
import pytest

import clusterkv
from clusterkv import _calls, aio
from clusterkv.v1 import cache_service_pb2 as pb

from conftest import Server

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl program here")


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


class Authority:
    """Signs certificates; each party's files lie beside each other."""

    def __init__(self, folder: pathlib.Path, name: str):
        folder.mkdir()
        self.folder, self.key, self.pem = folder, str(folder / "ca.key"), str(folder / "ca.crt")
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
                "-subj", f"/CN={name}", "-keyout", self.key, "-out", self.pem)

    def issue(self, name: str, alternative_names: str) -> tuple[str, str]:
        """Certificate and key of `name`."""
        certificate, key, request, extensions = (
            str(self.folder / f"{name}.{end}") for end in ("crt", "key", "csr", "ext"))
        pathlib.Path(extensions).write_text(f"subjectAltName={alternative_names}\n")
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj",
                f"/CN={name}", "-keyout", key, "-out", request)
        openssl("x509", "-req", "-in", request, "-CA", self.pem, "-CAkey", self.key, "-CAcreateserial",
                "-days", "1", "-extfile", extensions, "-out", certificate)
        return certificate, key


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("tls") / "ours", "tests")


@pytest.fixture(scope="module")
def worker_files(authority):
    """(ca, certificate, key) of a worker that the server lets in."""
    return (authority.pem, *authority.issue("worker", "DNS:worker"))


@pytest.fixture(scope="module")
def secure_server(server_program, authority):
    certificate, key = authority.issue("server", "DNS:kv.example,IP:127.0.0.1")
    server = Server(server_program, flags=[
        f"--tls_certificate_file={certificate}", f"--tls_key_file={key}",
        f"--tls_client_ca_file={authority.pem}"])
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def stranger_files(authority, tmp_path_factory):
    """The right authority for the server, a certificate that another one signed."""
    other = Authority(tmp_path_factory.mktemp("tls") / "theirs", "others")
    return (authority.pem, *other.issue("worker", "DNS:worker"))


def native_flags(files):
    return dict(zip(("tls_ca", "tls_cert", "tls_key"), files))


def test_the_clients_show_their_certificate(secure_server, worker_files):
    credentials = clusterkv.tls(*worker_files)
    with clusterkv.Client(secure_server.target, credentials=credentials) as client:
        assert "default" in client.server_info().presets
        with client.session("tls") as session:
            assert session.alive
    with clusterkv.AdminClient(secure_server.admin_target, credentials=credentials) as admin:
        assert admin.verify_ledger().balanced

    async def run():
        async with aio.Client(secure_server.target, credentials=credentials) as client:
            assert "default" in (await client.server_info()).presets
        async with aio.AdminClient(secure_server.admin_target, credentials=credentials) as admin:
            assert (await admin.verify_ledger()).balanced

    asyncio.run(run())


def test_who_shows_no_certificate_or_a_strangers_is_refused(secure_server, authority, stranger_files):
    for credentials in (None, clusterkv.tls(authority.pem), clusterkv.tls(*stranger_files)):
        with clusterkv.Client(secure_server.target, credentials=credentials, timeout=5) as client:
            with pytest.raises(clusterkv.UnavailableError):
                client.server_info()


def test_the_native_worker_fills_and_decodes_through_mutual_tls(secure_server, worker_files):
    native = pytest.importorskip("clusterkv._native")
    connection = native.Connection(secure_server.target, **native_flags(worker_files))
    request = _calls.open_request("tls", layers=1, kv_heads=2, query_heads=4, head_dim=32, dtype="float32",
                                  prompt_tokens=200, max_decode_tokens=4)
    sequence = connection.open(request.SerializeToString())
    keys, values = (np.random.default_rng(i).standard_normal((200, 2, 32), np.float32) for i in (1, 2))
    writer = native.PrefillWriter(connection, sequence)
    writer.put(0, 0, 200, keys, values, np.ones((2, 32), np.float32))
    sealed = pb.Sequence.FromString(writer.finish())
    hot = pb.HotCacheConfig(capacity_tokens=64, policy=pb.HOT_CACHE_POLICY_TOKEN_LRU)
    decoder = native.DecodeSession(connection, sealed.handle.SerializeToString(), hot.SerializeToString())
    output = np.full((1, 4, 32), np.nan, np.float32)
    figures = decoder.steps(0, keys[:1], values[:1], np.ones((1, 4, 32), np.float32), output)
    assert np.isfinite(output).all() and figures["exact_tokens"] > 0


def test_the_native_worker_checks_the_servers_name(secure_server, worker_files, tmp_path):
    native = pytest.importorskip("clusterkv._native")
    flags = native_flags(worker_files)
    native.Connection(secure_server.target, **flags, tls_server_name="kv.example")
    with pytest.raises(clusterkv.UnavailableError):
        native.Connection(secure_server.target, timeout=2, **flags, tls_server_name="other.example")
    with pytest.raises(clusterkv.InvalidRequestError, match="cannot read"):
        native.Connection(secure_server.target, tls_ca=str(tmp_path / "none.crt"))
    with pytest.raises(clusterkv.InvalidRequestError, match="one of the two"):
        native.Connection(secure_server.target, tls_ca=flags["tls_ca"], tls_cert=flags["tls_cert"])


def test_the_native_worker_without_a_certificate_is_refused(secure_server, authority, stranger_files):
    native = pytest.importorskip("clusterkv._native")
    for flags in ({}, {"tls_ca": authority.pem}, native_flags(stranger_files)):
        with pytest.raises(clusterkv.UnavailableError):
            native.Connection(secure_server.target, timeout=2, **flags)


def test_a_models_kv_goes_through_mutual_tls(secure_server, worker_files):
    pytest.importorskip("clusterkv._native")
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import clusterkv.transformers as ckv
    from test_transformers import greedy, prompt, tiny

    model, ids = tiny(), prompt()
    cache = ckv.ClusterKVCache(model.config, server=secure_server.target, budget=4096,
                               **native_flags(worker_files))
    assert torch.equal(greedy(model, ids, cache=cache), greedy(model, ids))


def test_vllms_extra_configuration_takes_the_files(secure_server, worker_files):
    pytest.importorskip("clusterkv._native")
    torch = pytest.importorskip("torch")
    from clusterkv.vllm.worker import Options, Worker

    options = Options(server=secure_server.target, **native_flags(worker_files))
    worker = Worker(options, layers=1, kv_heads=2, query_heads=4, head_dim=32, dtype=torch.float32,
                    block_size=16)
    assert not list(worker._client.list("vllm-"))
    assert worker._native() is worker._native()
    with pytest.raises(clusterkv.UnavailableError):
        Options(server=secure_server.target, timeout=5).client().server_info()
