"""deploy/: its files against their schemas, its probes against a real server, and HAProxy, with the configuration
that ships, in front of Cog's servers that it finds by name. Docker runs in tests/test_docker.py, Kubernetes nowhere.
"""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest
import yaml
from dnslib import QTYPE, RR, SRV, A, DNSRecord
from dnslib.server import BaseResolver, DNSLogger, DNSServer

from cli import events, schema, server
from cli.events import Event
from llm.weights.settings import ROOT
from tests.support import words
from tests.support.client import LONG, SHORT, SSE
from tests.support.processes import FINALLY, Marked

DEPLOY = ROOT / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
KUBERNETES: list[dict[str, Any]] = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")))
CONFIGURATION = (DEPLOY / "haproxy.cfg").read_text(encoding="utf-8")
ENVIRONMENT: dict[str, str] = COMPOSE["x-cog"]["environment"]
"""The environment of a server in its container."""

# Debian installs it in a folder that is not in a user's PATH
HAPROXY = shutil.which("haproxy", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")
needs_haproxy = pytest.mark.skipif(
    HAPROXY is None, reason="deploy/haproxy.cfg no se ha probado: haproxy no está instalado (apt install haproxy)"
)


# The files


def valid(tool: str, *arguments: str | Path) -> bool:
    return subprocess.run([sys.executable, "-m", tool, *arguments], capture_output=True).returncode == 0


def valid_compose(path: Path) -> bool:
    return valid("check_jsonschema", "--builtin-schema", "vendor.compose-spec", path)


def valid_kubernetes(path: Path) -> bool:
    return valid("kubernetes_validate", "--strict", path)


def test_each_file_is_valid() -> None:
    assert valid_compose(DEPLOY / "compose.yaml")
    assert valid_kubernetes(DEPLOY / "kubernetes.yaml")


@pytest.mark.parametrize(
    ("name", "check", "word", "wrong"),
    [
        ("compose.yaml", valid_compose, "pull_policy", "pull"),
        ("kubernetes.yaml", valid_kubernetes, "maxReplicas", "max_replicas"),
        ("kubernetes.yaml", valid_kubernetes, "clusterIP: None", "clusterIP: []"),
    ],
)
def test_a_mistake_in_a_file_is_found(
    tmp_path: Path, name: str, check: Callable[[Path], bool], word: str, wrong: str
) -> None:
    text = (DEPLOY / name).read_text(encoding="utf-8")
    (tmp_path / name).write_text(text.replace(word, wrong), encoding="utf-8")
    assert not check(tmp_path / name)


def resource(kind: str, name: str) -> Any:
    (document,) = [each for each in KUBERNETES if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return document["spec"]


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable.get("value", "") for variable in container["env"]}


def test_compose_kubernetes_and_haproxy_agree() -> None:
    (cog,) = resource("Deployment", "falcon-cog")["template"]["spec"]["containers"]
    (proxy,) = resource("Deployment", "falcon")["template"]["spec"]["containers"]
    composed = COMPOSE["services"]["proxy"]
    assert environment(cog) == ENVIRONMENT
    assert proxy["image"] == composed["image"]
    # the servers' names
    aliases = COMPOSE["x-cog"]["networks"]["servers"]["aliases"]
    assert [composed["environment"].pop("SERVERS")] == [f"{name}:5000" for name in aliases]
    variables = environment(proxy)
    assert variables.pop("SERVERS").startswith("falcon-cog.") and resource("Service", "falcon-cog")
    assert variables.pop("NAMESPACE") == ""
    assert variables == composed["environment"]
    # predictions at once, and Cog's places
    concurrency = schema.read(ROOT / "predict.py").concurrency
    assert re.findall(r"maxconn (\d+)$", CONFIGURATION, re.MULTILINE) == ["4096", str(concurrency)]
    assert int(ENVIRONMENT["COG_MAX_CONCURRENCY"]) == 2 * concurrency
    # the number of servers
    scaler = resource("HorizontalPodAutoscaler", "falcon-cog")
    (most,) = set(re.findall(r"server-template cog 1-(\d+)", CONFIGURATION))
    assert scaler["maxReplicas"] <= int(most)
    assert resource("Deployment", scaler["scaleTargetRef"]["name"])
    # the selectors
    for name in ("falcon", "falcon-cog"):
        labels = resource("Deployment", name)["template"]["metadata"]["labels"]
        assert resource("Service", name)["selector"] == labels == {"app": name}
    policy = resource("NetworkPolicy", "falcon-cog")
    assert policy["podSelector"]["matchLabels"] == {"app": "falcon-cog"}
    assert policy["ingress"][0]["from"] == [{"podSelector": {"matchLabels": {"app": "falcon"}}}]


CONTAINERS = {
    each["metadata"]["name"]: (each["spec"]["template"]["spec"], *each["spec"]["template"]["spec"]["containers"])
    for each in KUBERNETES
    if each["kind"] == "Deployment"
}


@pytest.mark.parametrize("name", sorted(COMPOSE["services"]))
def test_what_docker_runs_is_confined(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pids_limit"] and service["mem_limit"]
    assert not {"privileged", "pid", "ipc", "network_mode", "devices"} & service.keys()
    # the server needs a place to write
    assert name == "proxy" or [path.partition(":")[0] for path in service["tmpfs"]] == ["/tmp"]


@pytest.mark.parametrize("name", sorted(CONTAINERS))
def test_what_kubernetes_runs_is_confined(name: str) -> None:
    pod, *containers = CONTAINERS[name]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    for container in containers:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        resources = container["resources"]
        assert {"cpu", "memory"} <= resources["requests"].keys() and "memory" in resources["limits"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        # the server needs a place to write
        assert name == "falcon" or mounts["/tmp"]["emptyDir"]["medium"] == "Memory"


def test_each_pod_has_a_network_policy_and_the_servers_a_disruption_budget() -> None:
    for name in CONTAINERS:
        policy = resource("NetworkPolicy", name)
        assert policy["podSelector"]["matchLabels"] == {"app": name}
        assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
        # an entry without `from` would let in anybody
        assert all(entry["from"] for entry in policy["ingress"])
    to_servers, to_dns = resource("NetworkPolicy", "falcon")["egress"]
    assert to_servers["to"] == [{"podSelector": {"matchLabels": {"app": "falcon-cog"}}}]
    assert {port["port"] for port in to_dns["ports"]} == {53}
    assert resource("PodDisruptionBudget", "falcon-cog")["selector"]["matchLabels"] == {"app": "falcon-cog"}


def test_published_ports_listen_on_this_machine_alone() -> None:
    published = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    documents = [ROOT / "README.md", ROOT / "README.en.md", ROOT / "CONTRIBUTING.md", DEPLOY / "README.md"]
    documents += (ROOT / "docs").glob("*.md")
    text = "".join(path.read_text(encoding="utf-8") for path in documents)
    runs = re.findall(r"^docker run (?:.*\\\n)*.*", text, re.MULTILINE)
    published += [port for run in runs for port in re.findall(r"(?:-p|--publish)[ =](\S+)", run)]
    # in compose.yaml and both READMEs
    assert len(published) >= 3 and {port.split(":")[0] for port in published} == {server.HOST}
    # without it, `docker stop` cuts a running stream after 10 s
    assert all("--stop-timeout 600 " in run for run in runs)
    # so does kubectl port-forward without --address
    assert not re.search(r"--address|--host|0\.0\.0\.0", text)
    assert all(each["spec"].get("type", "ClusterIP") == "ClusterIP" for each in KUBERNETES if each["kind"] == "Service")


# The probes


def probe(command: list[str], port: int) -> subprocess.CompletedProcess[str]:
    """Run the container's probe on a server's own port; it prints SIGTERM instead of ending process 1."""
    name, flag, source = command
    assert (name, flag) == ("python", "-c")
    source = source.replace("5000", str(port)).replace("os.kill(1, 15)", "print('SIGTERM')")
    return subprocess.run([sys.executable, flag, source], capture_output=True, text=True)


@pytest.mark.slow
def test_the_probes_follow_the_servers_status(tmp_path: Path, processes: Marked) -> None:
    (container,) = resource("Deployment", "falcon-cog")["template"]["spec"]["containers"]
    (kubernetes,) = {
        tuple(container[f"{name}Probe"]["exec"]["command"]) for name in ("startup", "readiness", "liveness")
    }
    compose = COMPOSE["x-cog"]["healthcheck"]["test"][1:]

    def observed() -> tuple[str, bool, bool, str]:
        """The status, whether Kubernetes' probe and compose's pass, and what compose's prints."""
        composed = probe(compose, running.port)
        passes = probe(list(kubernetes), running.port).returncode == 0
        return running.health()["status"], passes, composed.returncode == 0, composed.stdout

    variables = words.write(tmp_path) | processes.environment | {"COG_MAX_CONCURRENCY": "1"}
    waits = "import os\n        while not os.path.exists('ready'): time.sleep(0.01)"
    (tmp_path / "predict.py").write_text(words.source().replace(words.SETUP, f"{words.SETUP}; {waits}"))
    with server.running(folder=tmp_path, environment=variables) as running:
        while not running.port:
            time.sleep(0.01)
        assert observed() == ("STARTING", False, False, "")
        (tmp_path / "ready").touch()
        running.wait_until_ready()
        assert observed() == ("READY", True, True, "")
        with httpx.stream("POST", f"{running.url}/predictions", json={"input": LONG}, headers=SSE) as stream:
            lines = stream.iter_lines()
            assert next(lines) == "event: start"
            assert observed() == ("BUSY", True, True, "")
        (worker,) = processes.alive("_run_worker")
        worker.kill()
        while running.health()["status"] in ("READY", "BUSY"):
            time.sleep(0.01)
        assert observed() == ("UNHEALTHY", False, False, "SIGTERM\n")
        # as tini passes the signal on
        (process,) = processes.alive("cog.server.http")
        process.terminate()
        process.wait(FINALLY)
    assert probe(list(kubernetes), running.port).returncode != 0
    assert probe(compose, running.port).returncode != 0


# HAProxy


class Names(BaseResolver):  # type: ignore[misc]
    """Answers with the servers' SRV records, which have their ports, and with the one address of all."""

    def __init__(self) -> None:
        self.ports: list[int] = []

    def resolve(self, request: DNSRecord, handler: object) -> DNSRecord:
        reply = request.reply()
        if request.q.qtype == QTYPE.SRV:
            for port in self.ports:
                host = f"{port}.test"
                reply.add_answer(RR(request.q.qname, QTYPE.SRV, rdata=SRV(weight=100, port=port, target=host)))
                reply.add_ar(RR(host, QTYPE.A, rdata=A(server.HOST)))
        elif request.q.qtype == QTYPE.A:
            reply.add_answer(RR(request.q.qname, QTYPE.A, rdata=A(server.HOST)))
        return reply


class Site:
    """HAProxy in front of the servers that it finds."""

    def __init__(self, names: Names, url: str, metrics: str, log: Path) -> None:
        self.names = names
        self.url = url
        self.client = httpx.Client(
            base_url=url, timeout=FINALLY * 2, trust_env=False, limits=httpx.Limits(max_connections=None)
        )
        self._metrics = metrics
        self._log = log

    def metric(self, name: str) -> int:
        """HAProxy's metric of the backend for predictions."""
        text = self.client.get(self._metrics).text
        (value,) = re.findall(rf'^haproxy_backend_{name}{{proxy="predictions"}} (\d+)$', text, re.MULTILINE)
        return int(value)

    def wait(self, name: str, value: int, most: int | None = None) -> None:
        """Wait until the metric is `value`, or from `value` to `most`."""
        give_up = time.monotonic() + FINALLY
        while not value <= (now := self.metric(name)) <= (most or value):
            assert time.monotonic() < give_up, f"{name}: {now}"
            time.sleep(0.05)

    def logged(self, prediction: str) -> tuple[str, str]:
        """The server that got the prediction and the status that it answered, once the prediction has ended."""
        line = rf' predictions/(\w+) \S+ (\S+) .*"PUT /predictions/{prediction} '
        give_up = time.monotonic() + FINALLY
        while not (entries := re.findall(line, self._log.read_text())):
            assert time.monotonic() < give_up, prediction
            time.sleep(0.05)
        return entries[-1][0], entries[-1][1]

    def predict(self) -> httpx.Response:
        return self.client.post("/predictions", json={"input": SHORT})

    @contextmanager
    def stream(self, method: str = "POST", path: str = "/predictions") -> Iterator[Iterator[Event]]:
        """The events of a long prediction as they come: name, data."""
        with self.client.stream(method, path, json={"input": LONG}, headers=SSE) as response:
            assert response.status_code == httpx.codes.OK, response.read()
            yield events.read(response.iter_bytes())

    def end_of(self, prediction: str, max_tokens: int) -> str:
        """How the prediction ends for the client that streams it."""
        inputs = {**LONG, "max_tokens": max_tokens}
        try:
            with self.client.stream(
                "PUT", f"/predictions/{prediction}", json={"input": inputs}, headers=SSE
            ) as response:
                if response.status_code != httpx.codes.OK:
                    return str(response.status_code)
                *_, (_, data) = events.read(response.iter_bytes())
                return str(data.get("status"))
        except (httpx.RemoteProtocolError, httpx.ReadError):
            return "cut"


@contextmanager
def haproxy(folder: Path, servers: str = "_cog._tcp.test") -> Iterator[Site]:
    """HAProxy with the configuration that ships, on ports that are taken before it starts."""
    assert HAPROXY
    names = Names()
    dns = DNSServer(names, address=server.HOST, port=0, logger=DNSLogger("-request,-reply"))
    dns.start_thread()
    with ExitStack() as stack:
        stack.callback(dns.stop)
        sockets = [stack.enter_context(socket.create_server((server.HOST, 0))) for _ in range(2)]
        log = folder / "haproxy.log"
        process = subprocess.Popen(
            [HAPROXY, "-db", "-f", DEPLOY / "haproxy.cfg"],
            env={
                "LISTEN": f"fd@{sockets[0].fileno()}",
                "METRICS": f"fd@{sockets[1].fileno()}",
                "SERVERS": servers,
                "HOSTNAME": uuid.uuid4().hex,
                "DNS": f"{server.HOST}:{dns.server.server_address[1]}",
            },
            pass_fds=[each.fileno() for each in sockets],
            stdout=stack.enter_context(log.open("wb")),
            stderr=subprocess.STDOUT,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        url, metrics = (f"http://{server.HOST}:{each.getsockname()[1]}" for each in sockets)
        yield Site(names, url, f"{metrics}/metrics", log)
        assert process.poll() is None, log.read_text()


@pytest.fixture(scope="module")
def marked() -> Marked:
    """The processes of the servers behind HAProxy."""
    return Marked()


@pytest.fixture(scope="module")
def start(
    marked: Marked, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], AbstractContextManager[server.Server]]:
    """Starts one of them: Cog's, without a model, for HAProxy sees no texts."""
    folder = tmp_path_factory.mktemp("words")
    # an answer of 2,048 words lasts a minute
    variables = words.write(folder, seconds=0.03) | marked.environment | ENVIRONMENT
    return lambda: server.running(folder=folder, environment=variables)


@pytest.fixture(scope="module")
def started(
    start: Callable[[], AbstractContextManager[server.Server]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Site, list[server.Server]]]:
    with ExitStack() as stack:
        servers = [stack.enter_context(start()) for _ in range(2)]
        for each in servers:
            each.wait_until_ready()
        site = stack.enter_context(haproxy(tmp_path_factory.mktemp("haproxy")))
        site.names.ports = [each.port for each in servers]
        site.wait("active_servers", 2)
        yield site, servers


@pytest.fixture
def site(started: tuple[Site, list[server.Server]]) -> Site:
    return started[0]


@pytest.fixture
def servers(started: tuple[Site, list[server.Server]]) -> list[server.Server]:
    """The two servers behind the site."""
    return started[1]


def ask(site: Site, method: str, path: str, body: str | None = None) -> tuple[int, str]:
    """Ask for the path as it is written, which any client library would normalize."""
    connection = http.client.HTTPConnection(urlsplit(site.url).netloc, timeout=FINALLY)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


BODY = json.dumps({"input": {**SHORT, "max_tokens": 1}})


@needs_haproxy
def test_without_a_dns_variable_haproxy_takes_the_systems() -> None:
    assert HAPROXY
    variables = {"LISTEN": ":5000", "METRICS": ":8404", "SERVERS": "cog:5000"}
    subprocess.run([HAPROXY, "-c", "-f", DEPLOY / "haproxy.cfg"], env=variables, check=True)


@needs_haproxy
@pytest.mark.slow
def test_haproxy_finds_a_server_by_name_and_port_too(servers: list[server.Server], tmp_path: Path) -> None:
    with haproxy(tmp_path, f"cog.test:{servers[0].port}") as site:
        site.wait("active_servers", 1)
        assert site.predict().json()["status"] == "succeeded"


@needs_haproxy
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("PUT", "/predictions/" + "a" * 64, 200),
        ("PUT", "/predictions/A-z_0", 200),
        ("PUT", "/predictions/cancel", 200),
        ("PUT", "/predictions/" + "a" * 65, 400),
        ("PUT", "/predictions/" + "a" * 256, 400),
        ("PUT", "/predictions/%00", 400),
        ("PUT", "/predictions/%61", 400),
        ("PUT", "/predictions/..%2F..%2Fx%2Fdeep", 400),
        ("PUT", "/predictions/../shutdown", 400),
        ("PUT", "/predictions/a.b", 400),
        ("PUT", "/predictions/a%C3%B1o", 400),
        ("POST", "/predictions/..%2F..%2Fx/cancel", 400),
        ("POST", "/predictions/%2e%2e/cancel", 400),
        ("POST", "/predictions/" + "a" * 65 + "/cancel", 400),
        ("POST", "/predictions/", 400),
        ("POST", "/predictions/ninguna/cancel", 404),
        ("POST", "/shutdown", 404),
        ("POST", "//shutdown", 404),
        ("POST", "/%73hutdown", 404),
        ("POST", "/trainings", 404),
        ("GET", "/predictions", 404),
        ("DELETE", "/predictions/a", 404),
        ("GET", "/", 404),
        ("GET", "/metrics", 404),
        ("GET", "/health-check", 200),
        ("GET", "/openapi.json", 200),
    ],
)
def test_only_what_clients_need_is_let_through(site: Site, method: str, path: str, status: int) -> None:
    body = None if method == "GET" or (method == "POST" and path.endswith("/cancel")) else BODY
    answer, text = ask(site, method, path, body)
    assert answer == status, text


@needs_haproxy
@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (BODY.ljust(1_000_000), {}, 200),
        (BODY.ljust(1_000_001), {}, 413),
        ("x" * 50_000_000, {}, 413),
        # without a length
        (iter([BODY.encode()]), {}, 411),
        # the whole body has to fit beside its headers
        (BODY.ljust(1_000_000), {"X": "x" * 50_000}, 413),
        (BODY, {"Prefer": "respond-async"}, 400),
        (BODY, {"Prefer": "wait, respond-async"}, 400),
        (BODY, {"Prefer": "wait"}, 200),
        (BODY[:-1] + ', "webhook": "http://127.0.0.1/shutdown"}', {}, 400),
        (r'{"\u0077ebh\u006Fok" : "http://127.0.0.1/shutdown", ' + BODY[1:], {}, 400),
        (json.dumps({"input": {**SHORT, "pregunta": '{"webhook": 1}'}}), {}, 200),
        # the server itself refuses an id in the body, for which it would make a folder
        (BODY[:-1] + ', "id": "../../x"}', {}, 422),
        (BODY[:-1] + r', "i\u0064": "una"}', {}, 422),
        ("{", {}, 400),
    ],
)
def test_large_async_or_webhook_bodies_are_refused(site: Site, body: Any, headers: dict[str, str], status: int) -> None:
    answer = site.client.post("/predictions", content=body, headers={"Content-Type": "application/json", **headers})
    assert answer.status_code == status, answer.text


@needs_haproxy
@pytest.mark.slow
def test_a_stream_is_not_buffered_and_its_cancel_reaches_its_server(site: Site) -> None:
    with ExitStack() as clients:
        streams = [clients.enter_context(site.stream()) for _ in range(4)]
        # on both servers
        ids = []
        for stream in streams:
            ids.append(next(data["id"] for name, data in stream if name == "start"))
            assert next(name for name, _ in stream if name != "log") == "output"
        # in another order than they started, in which a guess would be right
        for place in (0, 2, 1, 3):
            assert ask(site, "POST", f"/predictions/{ids[place]}/cancel")[0] == httpx.codes.OK
            *_, (name, end) = streams[place]
            assert (name, end["status"]) == ("completed", "canceled")
    site.wait("current_sessions", 0)


@needs_haproxy
@pytest.mark.slow
def test_a_request_with_the_id_of_a_running_prediction_joins_it(site: Site) -> None:
    with ExitStack() as clients:
        first = clients.enter_context(site.stream("PUT", "/predictions/una"))
        beginning = [next(first) for _ in range(4)]
        # else one of the two would go to the other server
        again = [clients.enter_context(site.stream("PUT", "/predictions/una")) for _ in range(2)]
        for stream in again:
            assert [next(stream) for _ in range(4)] == beginning
        assert ask(site, "POST", "/predictions/una/cancel")[0] == httpx.codes.OK
        for stream in (first, *again):
            *_, (_, end) = stream
            assert end["status"] == "canceled"
    site.wait("current_sessions", 0)


@needs_haproxy
@pytest.mark.slow
def test_96_clients_are_answered(site: Site) -> None:
    with ThreadPoolExecutor(96) as clients:
        for _ in range(3):
            answers = list(clients.map(lambda _: site.predict(), range(96)))
            assert [answer.text for answer in answers if answer.status_code != httpx.codes.OK] == []
            assert {answer.json()["status"] for answer in answers} == {"succeeded"}


@needs_haproxy
@pytest.mark.slow
def test_a_client_that_leaves_makes_room_for_one_that_waits(site: Site) -> None:
    with ThreadPoolExecutor(64) as clients:
        with ExitStack() as leaving:
            for _ in range(64):
                leaving.enter_context(site.stream())
            answers = [clients.submit(site.predict) for _ in range(64)]
            # what the autoscaler counts
            site.wait("current_queue", 64)
            assert site.metric("current_sessions") == 128
        assert [answer.result().text for answer in answers if answer.result().status_code != httpx.codes.OK] == []


@needs_haproxy
@pytest.mark.slow
def test_a_client_that_leaves_before_its_answer_ends_its_prediction(site: Site) -> None:
    with pytest.raises(httpx.ReadTimeout):
        site.client.put("/predictions/se-va", json={"input": LONG}, timeout=1)
    _, status = site.logged("se-va")
    assert status != "200"


@needs_haproxy
@pytest.mark.slow
def test_servers_may_die_and_come_back(
    site: Site,
    servers: list[server.Server],
    start: Callable[[], AbstractContextManager[server.Server]],
    marked: Marked,
) -> None:
    """The last of the site's tests: afterwards there is no server behind it."""
    with ThreadPoolExecutor(96) as clients:

        def ask_all(prefix: str) -> dict[str, "Future[str]"]:
            ids = [f"{prefix}-{number}" for number in range(96)]
            return {name: clients.submit(site.end_of, name, 64) for name in ids}

        running = ask_all("antes")
        site.wait("current_queue", 1, 32)
        os.killpg(os.getpgid(http_process(marked, servers[0]).pid), signal.SIGKILL)
        ends = {name: future.result() for name, future in running.items()}
        failed = [name for name, end in ends.items() if end != "succeeded"]
        # what ran on the killed server, and what HAProxy gave it while it died
        assert 0 < len([name for name in failed if ends[name] == "cut"]) <= 32
        assert len(failed) <= 64 and {ends[name] for name in failed} <= {"cut", "502"}
        assert len({site.logged(name)[0] for name in failed}) == 1

        with start() as restarted:
            while not restarted.port:
                assert site.end_of("sin-ella", 8) == "succeeded"
            # HAProxy finds the server while it loads, as it does a container
            site.names.ports = [servers[1].port, restarted.port]
            while restarted.health()["status"] != "READY":
                assert site.end_of("mientras", 8) == "succeeded"
            site.wait("active_servers", 2)

            running = ask_all("luego")
            site.wait("current_queue", 1, 32)
            # the signal goes to this process alone, as from tini: the server ends what it runs
            stopped = http_process(marked, servers[1])
            stopped.terminate()
            assert {future.result() for future in running.values()} == {"succeeded"}
            assert len({site.logged(name)[0] for name in running}) == 2
            stopped.wait(FINALLY)

            # a server without its worker still answers /health-check with 200
            for worker in http_process(marked, restarted).children():
                worker.kill()
            site.wait("active_servers", 0)
            assert site.predict().status_code == httpx.codes.SERVICE_UNAVAILABLE


def http_process(processes: Marked, running: server.Server) -> psutil.Process:
    """The process that listens, which is not the worker's."""
    (listening,) = [
        process
        for process in processes.alive("cog.server.http")
        if running.port in [connection.laddr.port for connection in process.net_connections()]
    ]
    return listening
