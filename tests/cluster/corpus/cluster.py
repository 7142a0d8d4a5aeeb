"""The objects of the corpus: what a cluster can hold that mesh facts or policies depend on, in stages."""


def meta(namespace, name, **more):
    return {"namespace": namespace, "name": name, **more}


def namespace(name, labels=None, annotations=None):
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels or {}, "annotations": annotations or {}}}


def account(namespace, name):
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta(namespace, name)}


def node(name, labels):
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}}


def owner(kind, name, api="apps/v1", controller=True):
    return {"apiVersion": api, "kind": kind, "name": name, "uid": f"{kind}-{name}".lower(), "controller": controller}


def port(number, name=None, protocol="TCP"):
    return {"containerPort": number, "protocol": protocol, **({"name": name} if name else {})}


IN = {"ambient.istio.io/redirection": "enabled"}
READY = [{"type": "Ready", "status": "True"}]


def pod(namespace, name, ips=(), *, labels=None, annotations=None, phase="Running", ready=True, where="n3", ports=(), init=(), owners=(), generated=None, **spec):
    """A pod that no kubelet runs, with the status that a kubelet would have given it."""
    metadata = meta(namespace, name, labels=labels or {}, annotations=IN if annotations is None else annotations)
    if owners:
        metadata["ownerReferences"] = list(owners)
    if generated:
        metadata["generateName"] = generated
    container = {"name": "main", "image": "example.org/app:1", "ports": list(ports)}
    status = {"phase": phase}
    if ips:
        status |= {"podIP": ips[0], "podIPs": [{"ip": ip} for ip in ips]}
    if ready is not None:
        status["conditions"] = [{"type": "Ready", "status": "True" if ready else "False"}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {"nodeName": where, "containers": [container], **({"initContainers": list(init)} if init else {}), **spec},
        "status": status,
    }


def service(namespace, name, ports, *, selector=None, labels=None, annotations=None, **spec):
    spec = {"ports": ports, **({"selector": selector} if selector else {}), **spec}
    return {"apiVersion": "v1", "kind": "Service", "metadata": meta(namespace, name, labels=labels or {}, annotations=annotations or {}), "spec": spec}


def served(number, target=None, name=None, protocol="TCP", app=None):
    one = {"port": number, "protocol": protocol}
    one |= {"targetPort": target} if target else {}
    one |= {"name": name} if name else {}
    return one | ({"appProtocol": app} if app else {})


def endpoints(namespace, name, of, endpoints, ports, family="IPv4"):
    labels = {"kubernetes.io/service-name": of} if of else {}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": meta(namespace, name, labels=labels),
        "addressType": family,
        "endpoints": endpoints,
        "ports": ports,
    }


def security(kind, namespace, name, spec, **more):
    return {"apiVersion": "security.istio.io/v1", "kind": kind, "metadata": meta(namespace, name, **more), "spec": spec}


def workload(kind, name, spec, api="apps/v1"):
    return {"apiVersion": api, "kind": kind, "metadata": meta("owners", name), "spec": spec}


def template(app, restart="Always"):
    main = {"name": "main", "image": "example.org/app:1", "args": ["sleep"], "ports": [{"name": "web", "containerPort": 8080}]}
    return {"metadata": {"labels": {"app": app}}, "spec": {"terminationGracePeriodSeconds": 1, "restartPolicy": restart, "containers": [main]}}


# What controllers make is real: pods of each kind of owner, and EndpointSlices.
REAL = [
    namespace("owners", {"istio.io/dataplane-mode": "ambient"}),
    workload("Deployment", "replicated", {"replicas": 2, "selector": {"matchLabels": {"app": "replicated"}}, "template": template("replicated")}),
    workload("StatefulSet", "ordered", {"serviceName": "ordered", "selector": {"matchLabels": {"app": "ordered"}}, "template": template("ordered")}),
    workload("DaemonSet", "everywhere", {"selector": {"matchLabels": {"app": "everywhere"}}, "template": template("everywhere")}),
    workload("Job", "once", {"template": template("once", "Never")}, "batch/v1"),
    workload("CronJob", "often", {"schedule": "* * * * *", "concurrencyPolicy": "Forbid", "jobTemplate": {"spec": {"template": template("often", "Never")}}}, "batch/v1"),
    service("owners", "replicated", [served(80, "web", "http")], selector={"app": "replicated"}, ipFamilyPolicy="PreferDualStack"),
    service("owners", "ordered", [served(80, 8080, "http")], selector={"app": "ordered"}, clusterIP="None"),
    *(
        namespace(name)
        for name in ("fields", "services", "slices", "authorize", "elsewhere", "peer-strict", "peer-unset", "peer-none", "peer-ports")
    ),
    namespace("close", annotations={"networking.istio.io/traffic-distribution": "PreferClose"}),
    namespace("ways", {"istio.io/use-waypoint": "waypoint", "istio.io/ingress-use-waypoint": "true"}),
    *(account(of, "other") for of in ("fields", "authorize")),
]

# From here on no controller runs, so that these objects stay as they are.
HASH = {"pod-template-hash": "5c9d7"}
FIELDS = [
    node("n3", {"topology.kubernetes.io/region": "r3", "topology.kubernetes.io/zone": "z3", "topology.istio.io/subzone": "s3"}),
    node("n4", {"topology.kubernetes.io/zone": "z4"}),
    node("n5", {}),
    # Capture, health, phase, addresses.
    pod("fields", "captured", ["10.1.0.1"]),
    pod("fields", "pending-capture", ["10.1.0.2"], annotations={"ambient.istio.io/redirection": "pending"}),
    pod("fields", "outside", ["10.1.0.3"], annotations={}),
    pod("fields", "tunnel-label", ["10.1.0.4"], annotations={}, labels={"networking.istio.io/tunnel": "http"}),
    pod("fields", "tunnel-label-and-capture", ["10.1.0.5"], labels={"networking.istio.io/tunnel": "http"}),
    pod("fields", "tunnel-label-of-several", ["10.1.0.6"], annotations={}, labels={"networking.istio.io/tunnel": "none.http"}),
    pod("fields", "tunnel-label-none", ["10.1.0.7"], annotations={}, labels={"networking.istio.io/tunnel": "none"}),
    pod("fields", "sidecar", ["10.1.0.8"], annotations={"sidecar.istio.io/status": "{}"}, labels={"security.istio.io/tlsMode": "istio"}),
    pod("fields", "not-ready", ["10.1.0.9"], ready=False),
    pod("fields", "without-conditions", ["10.1.0.10"], ready=None),
    pod("fields", "starting", ["10.1.0.11"], phase="Pending", ready=False),
    pod("fields", "without-address", (), phase="Pending", ready=False),
    pod("fields", "succeeded", ["10.1.0.12"], phase="Succeeded", ready=False),
    pod("fields", "failed", ["10.1.0.13"], phase="Failed", ready=False),
    pod("fields", "phase-unknown", ["10.1.0.14"], phase="Unknown"),
    pod("fields", "dual", ["10.1.0.15", "fd00::15"]),
    pod("fields", "six", ["fd00::16"]),
    pod("fields", "host-network", ["192.168.0.3"], annotations={}, hostNetwork=True, ports=[port(9100, "metrics")]),
    pod("fields", "host-network-too", ["192.168.0.3"], annotations={}, hostNetwork=True, ports=[port(9101, "metrics")]),
    # Names, versions, accounts, places.
    pod("fields", "canonical", ["10.1.1.1"], labels={"service.istio.io/canonical-name": "c", "app.kubernetes.io/name": "k", "app": "a", "service.istio.io/canonical-revision": "r1", "app.kubernetes.io/version": "r2", "version": "r3"}),
    pod("fields", "recommended", ["10.1.1.2"], labels={"app.kubernetes.io/name": "k", "app": "a", "app.kubernetes.io/version": "r2", "version": "r3"}),
    pod("fields", "plain-labels", ["10.1.1.3"], labels={"app": "a", "version": "r3"}),
    pod("fields", "empty-labels", ["10.1.1.4"], labels={"app": "", "service.istio.io/canonical-name": "", "version": ""}),
    pod("fields", "named-by-label", ["10.1.1.5"], labels={"service.istio.io/workload-name": "given"}),
    pod("fields", "other-account", ["10.1.1.6"], serviceAccountName="other"),
    pod("fields", "on-n4", ["10.1.1.7"], where="n4"),
    pod("fields", "on-n5", ["10.1.1.8"], where="n5"),
    pod("fields", "on-no-known-node", ["10.1.1.9"], where="n6"),
    pod("fields", "network-label", ["10.1.1.10"], labels={"topology.istio.io/network": "elsewhere"}),
    # Owners.
    pod("fields", "web-5c9d7-abcde", ["10.1.2.1"], labels=HASH, generated="web-5c9d7-", owners=[owner("ReplicaSet", "web-5c9d7")]),
    pod("fields", "web-5c9d7-fghij", ["10.1.2.2"], labels={"pod-template-hash": "other"}, generated="web-5c9d7-", owners=[owner("ReplicaSet", "web-5c9d7")]),
    pod("fields", "single-5c9d7", ["10.1.2.3"], labels=HASH, owners=[owner("ReplicaSet", "web-5c9d7")]),
    pod("fields", "rolled-77f-abcde", ["10.1.2.4"], labels={"rollouts-pod-template-hash": "77f"}, generated="rolled-77f-", owners=[owner("ReplicaSet", "rolled-77f")]),
    pod("fields", "config-1-abcde", ["10.1.2.5"], labels={"deploymentconfig": "config"}, generated="config-1-", owners=[owner("ReplicationController", "config-1", "v1")]),
    pod("fields", "controlled-1-abcde", ["10.1.2.6"], generated="controlled-1-", owners=[owner("ReplicationController", "controlled-1", "v1")]),
    pod("fields", "cron-29612345-abcde", ["10.1.2.7"], generated="cron-29612345-", owners=[owner("Job", "cron-29612345", "batch/v1")]),
    pod("fields", "cron-2961234567-abcde", ["10.1.2.8"], generated="cron-2961234567-", owners=[owner("Job", "cron-2961234567", "batch/v1")]),
    pod("fields", "job-2961234-abcde", ["10.1.2.9"], generated="job-2961234-", owners=[owner("Job", "job-2961234", "batch/v1")]),
    pod("fields", "job-29612345678-abcde", ["10.1.2.10"], generated="job-29612345678-", owners=[owner("Job", "job-29612345678", "batch/v1")]),
    pod("fields", "custom-abcde", ["10.1.2.11"], generated="custom-", owners=[owner("Robot", "custom", "example.org/v1")]),
    pod("fields", "no-controller-abcde", ["10.1.2.12"], generated="no-controller-", owners=[owner("ReplicaSet", "not-the-controller", controller=False)]),
    pod("fields", "ordered-0", ["10.1.2.13"], generated="ordered-", owners=[owner("StatefulSet", "ordered")]),
    # A pod that ends, held by a finalizer.
    {**pod("fields", "ending", ["10.1.3.1"]), "delete": True},
]

KEYS = ("http", "https", "http2", "kubernetes.io/h2c", "kubernetes.io/ws", "kubernetes.io/wss", "grpc", "grpc-web", "tcp", "tls", "mongo", "redis", "mysql", "udp", "TLS", "HTTP", "odd.example.org/protocol")
NAMES = ("http-a", "https-a", "http2-a", "grpc-a", "grpc-web-a", "grpcx", "tcp-a", "tls-a", "mongo-a", "redis-a", "mysql-a", "udp-a", "auto-a", "httpx")
INIT = [
    {"name": "once", "image": "example.org/app:1", "ports": [port(7001, "of-once")]},
    {"name": "beside", "image": "example.org/app:1", "restartPolicy": "Always", "ports": [port(7002, "of-beside")]},
]
SERVICES = [
    pod("services", "back", ["10.2.0.1"], labels={"app": "back"}, ports=[port(8080, "web"), port(5353, "question", "UDP"), port(5354, "question-tcp")], init=INIT),
    pod("services", "back-of-other-ports", ["10.2.0.2"], labels={"app": "back"}, ports=[port(9090, "web")]),
    pod("services", "back-that-is-not-ready", ["10.2.0.3"], labels={"app": "back"}, ready=False, ports=[port(8080, "web")]),
    pod("services", "host", ["192.168.0.3"], labels={"app": "host"}, annotations={}, hostNetwork=True, ports=[port(9102, "metrics")]),
    service("services", "numbered", [served(80, 8080, "a"), served(81, name="b")], selector={"app": "back"}),
    service("services", "named", [served(80, "web", "a"), served(81, "missing", "b"), served(82, "of-once", "c"), served(83, "of-beside", "d"), served(84, "question", "e")], selector={"app": "back"}),
    service("services", "both-transports", [served(53, "question", "udp", "UDP"), served(53, "question-tcp", "tcp")], selector={"app": "back"}),
    service("services", "only-udp", [served(53, 5353, "dns", "UDP")], selector={"app": "back"}),
    service("services", "sctp", [served(53, 5353, "a", "SCTP")], selector={"app": "back"}),
    service("services", "unnamed-port", [served(80)], selector={"app": "back"}),
    service("services", "protocols-by-field", [served(1000 + i, name=f"p{i}", app=key) for i, key in enumerate(KEYS)], selector={"app": "back"}),
    service("services", "protocols-by-name", [served(1000 + i, name=key) for i, key in enumerate(NAMES)], selector={"app": "back"}),
    service("services", "well-known-ports", [served(3306, name="a"), served(6379, name="b"), served(443, name="c"), served(53, name="d")], selector={"app": "back"}),
    service("services", "dual", [served(80)], selector={"app": "back"}, ipFamilyPolicy="RequireDualStack"),
    service("services", "six", [served(80)], selector={"app": "back"}, ipFamilies=["IPv6"], ipFamilyPolicy="SingleStack"),
    service("services", "headless", [served(80, 8080)], selector={"app": "back"}, clusterIP="None"),
    service("services", "headless-without-ports", [], selector={"app": "back"}, clusterIP="None"),
    service("services", "headless-without-selector", [served(80)], clusterIP="None"),
    service("services", "headless-dual", [served(80)], selector={"app": "back"}, clusterIP="None", ipFamilyPolicy="RequireDualStack"),
    service("services", "external-name", [served(80)], type="ExternalName", externalName="example.com"),
    service("services", "balanced", [served(80, name="http")], selector={"app": "back"}, type="LoadBalancer"),
    service("services", "node-port", [served(80, name="http")], selector={"app": "back"}, type="NodePort", externalIPs=["203.0.113.7"]),
    service("services", "not-ready-too", [served(80)], selector={"app": "back"}, publishNotReadyAddresses=True),
    service("services", "not-ready-too-and-close", [served(80)], selector={"app": "back"}, publishNotReadyAddresses=True, trafficDistribution="PreferClose"),
    service("services", "local", [served(80)], selector={"app": "back"}, internalTrafficPolicy="Local"),
    service("services", "local-and-close", [served(80)], selector={"app": "back"}, internalTrafficPolicy="Local", trafficDistribution="PreferClose", publishNotReadyAddresses=True),
    service("services", "close", [served(80)], selector={"app": "back"}, trafficDistribution="PreferClose"),
    service("services", "same-zone", [served(80)], selector={"app": "back"}, trafficDistribution="PreferSameZone"),
    service("services", "same-node", [served(80)], selector={"app": "back"}, trafficDistribution="PreferSameNode"),
    *(
        service("services", f"annotated-{name}", [served(80)], selector={"app": "back"}, annotations={"networking.istio.io/traffic-distribution": value})
        for name, value in {"close": "PreferClose", "case": "preferCLOSE", "any": "Any", "region": "PreferRegion", "network": "PreferNetwork", "node": "PreferSameNode", "unknown": "Nearest", "empty": ""}.items()
    ),
    service("services", "field-over-annotation", [served(80)], selector={"app": "back"}, trafficDistribution="PreferSameNode", annotations={"networking.istio.io/traffic-distribution": "PreferClose"}),
    service("services", "none-of-these", [served(80)], selector={"app": "nobody"}),
    service("services", "two-labels", [served(80)], selector={"app": "back", "tier": "one"}),
    service("services", "on-host", [served(80, "metrics")], selector={"app": "host"}),
    service("services", "not-exported", [served(80)], selector={"app": "back"}, annotations={"networking.istio.io/exportTo": "~"}),
    service("services", "managed", [served(80)], selector={"app": "back"}, labels={"gateway.istio.io/managed": "istio.io-mesh-controller", "istio.io/use-waypoint": "waypoint", "istio.io/use-waypoint-namespace": "ways"}),
    service("elsewhere", "numbered", [served(80, 8080)], selector={"app": "back"}),
    pod("elsewhere", "back", ["10.2.1.1"], labels={"app": "back"}),
    pod("close", "back", ["10.2.2.1"], labels={"app": "back"}),
    service("close", "inherits", [served(80)], selector={"app": "back"}),
    service("close", "by-itself", [served(80)], selector={"app": "back"}, annotations={"networking.istio.io/traffic-distribution": "PreferSameNode"}),
    service("close", "unknown-by-itself", [served(80)], selector={"app": "back"}, annotations={"networking.istio.io/traffic-distribution": "Nearest"}),
]


def endpoint(addresses, target=None, uid="", **conditions):
    """With an empty uid, the recorder fills in that of the pod."""
    one = {"addresses": addresses, "conditions": conditions}
    reference = {"kind": "Pod", "namespace": "slices", "name": target, **({} if uid is None else {"uid": uid})}
    return one | ({"targetRef": reference} if target else {})


SLICES = [
    pod("slices", "chosen", ["10.3.0.1"], ports=[port(8080, "web")]),
    pod("slices", "chosen-not-ready", ["10.3.0.2"], ready=False),
    pod("slices", "selected", ["10.3.0.3"], labels={"app": "selected"}),
    service("slices", "to-pods", [served(80, 8080, "http")]),
    endpoints("slices", "to-pods-1", "to-pods", [endpoint(["10.3.0.1"], "chosen", ready=True), endpoint(["10.3.0.2"], "chosen-not-ready", ready=False)], [{"name": "http", "port": 8080, "protocol": "TCP"}]),
    service("slices", "to-pods-by-name", [served(80, "web", "http")]),
    endpoints("slices", "to-pods-by-name-1", "to-pods-by-name", [endpoint(["10.3.0.1"], "chosen", ready=True)], [{"name": "http", "port": 8081, "protocol": "TCP"}]),
    service("slices", "to-a-pod-without-uid", [served(80)]),
    endpoints("slices", "to-a-pod-without-uid-1", "to-a-pod-without-uid", [endpoint(["10.3.0.1"], "chosen", None, ready=True)], [{"port": 80, "protocol": "TCP"}]),
    service("slices", "to-an-earlier-pod", [served(80)]),
    endpoints("slices", "to-an-earlier-pod-1", "to-an-earlier-pod", [endpoint(["10.3.0.1"], "chosen", "uid-of-another", ready=True)], [{"port": 80, "protocol": "TCP"}]),
    service("slices", "to-a-pod-that-is-gone", [served(80)]),
    endpoints("slices", "to-a-pod-that-is-gone-1", "to-a-pod-that-is-gone", [endpoint(["10.3.0.9"], "gone", "uid-of-gone", ready=True)], [{"port": 80, "protocol": "TCP"}]),
    service("slices", "to-addresses", [served(80, 8080, "http"), served(90, 9090, "other"), served(53, 53, "dns", "UDP")]),
    endpoints("slices", "to-addresses-1", "to-addresses", [endpoint(["198.51.100.1"], ready=True), endpoint(["198.51.100.2"], ready=False), endpoint(["198.51.100.3"]), endpoint(["198.51.100.4"], ready=False, serving=True, terminating=True)], [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "dns", "port": 53, "protocol": "UDP"}]),
    endpoints("slices", "to-addresses-2", "to-addresses", [endpoint(["198.51.100.1"], ready=True)], [{"name": "other", "port": 9090, "protocol": "TCP"}]),
    endpoints("slices", "to-addresses-6", "to-addresses", [endpoint(["2001:db8::1"], ready=True)], [{"name": "http", "port": 8080, "protocol": "TCP"}], "IPv6"),
    endpoints("slices", "to-addresses-names", "to-addresses", [endpoint(["db.example.com"], ready=True)], [{"name": "http", "port": 8080, "protocol": "TCP"}], "FQDN"),
    endpoints("slices", "to-addresses-without-ports", "to-addresses", [endpoint(["198.51.100.5"], ready=True)], []),
    service("slices", "headless-to-addresses", [served(80, name="http")], clusterIP="None"),
    endpoints("slices", "headless-to-addresses-1", "headless-to-addresses", [endpoint(["198.51.100.20"], ready=True)], [{"name": "http", "port": 80, "protocol": "TCP"}]),
    service("slices", "with-a-selector", [served(80, name="http")], selector={"app": "selected"}),
    endpoints("slices", "with-a-selector-by-hand", "with-a-selector", [endpoint(["198.51.100.30"], ready=True)], [{"name": "http", "port": 80, "protocol": "TCP"}]),
    endpoints("slices", "of-no-service", "nothing", [endpoint(["198.51.100.40"], ready=True)], [{"port": 80, "protocol": "TCP"}]),
    endpoints("slices", "without-label", None, [endpoint(["198.51.100.41"], ready=True)], [{"port": 80, "protocol": "TCP"}]),
]


def gateway(namespace, name, addresses, *, kind="istio-waypoint", labels=None, annotations=None, allowed=None, listener=True):
    listeners = [{"name": "mesh", "port": 15008, "protocol": "HBONE", **({"allowedRoutes": allowed} if allowed else {})}]
    if not listener:
        listeners = [{"name": "http", "port": 80, "protocol": "HTTP"}]
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": meta(namespace, name, labels=labels or {}, annotations=annotations or {}),
        "spec": {"gatewayClassName": kind, "listeners": listeners},
        "status": {"addresses": [{"type": kind, "value": value} for kind, value in addresses]},
    }


USE, OF = "istio.io/use-waypoint", "istio.io/use-waypoint-namespace"
EVERY = {"namespaces": {"from": "All"}}
WAYS = [
    gateway("ways", "waypoint", [("IPAddress", "10.96.200.1")]),
    gateway("ways", "for-workloads", [("IPAddress", "10.96.200.2")], labels={"istio.io/waypoint-for": "workload"}),
    gateway("ways", "for-all", [("IPAddress", "10.96.200.3")], labels={"istio.io/waypoint-for": "all"}),
    gateway("ways", "for-none", [("IPAddress", "10.96.200.4")], labels={"istio.io/waypoint-for": "none"}),
    gateway("ways", "by-name", [("Hostname", "by-name.ways.svc.cluster.local")], labels={"istio.io/waypoint-for": "all"}),
    gateway("ways", "without-address", []),
    gateway("ways", "for-everybody", [("IPAddress", "10.96.200.5")], labels={"istio.io/waypoint-for": "all"}, allowed=EVERY),
    gateway("ways", "other-class", [("IPAddress", "10.96.200.6")], kind="other", labels={"istio.io/waypoint-for": "all"}),
    gateway("ways", "sandwiched", [("IPAddress", "10.96.200.7")], labels={"istio.io/waypoint-for": "all"}, annotations={"ambient.istio.io/waypoint-inbound-binding": "PROXY/15088"}),
    pod("ways", "inherits", ["10.4.0.1"], labels={"app": "back"}),
    *(
        pod("ways", f"uses-{name}", [f"10.4.1.{i + 1}"], labels={USE: name})
        for i, name in enumerate(("waypoint", "for-workloads", "for-all", "for-none", "by-name", "without-address", "other-class", "none", "missing", "sandwiched"))
    ),
    pod("ways", "is-a-waypoint", ["10.4.2.1"], labels={"gateway.networking.k8s.io/gateway-name": "for-all", USE: "for-all"}),
    pod("ways", "is-sandwiched", ["10.4.2.2"], labels={"gateway.networking.k8s.io/gateway-name": "sandwiched"}),
    pod("elsewhere", "uses-everybodys", ["10.4.3.1"], labels={USE: "for-everybody", OF: "ways"}),
    pod("elsewhere", "uses-one-that-is-not-for-it", ["10.4.3.2"], labels={USE: "for-all", OF: "ways"}),
    service("ways", "inherits", [served(80)], selector={"app": "back"}),
    *(
        service("ways", f"uses-{name}", [served(80)], selector={"app": "back"}, labels={USE: name})
        for name in ("for-workloads", "for-all", "by-name", "none", "missing", "without-address")
    ),
    service("ways", "not-for-ingress", [served(80)], selector={"app": "back"}, labels={"istio.io/ingress-use-waypoint": "false"}),
    service("elsewhere", "for-ingress", [served(80)], selector={"app": "back"}, labels={USE: "for-everybody", OF: "ways", "istio.io/ingress-use-waypoint": "true"}),
    service("elsewhere", "uses-one-that-is-not-for-it", [served(80)], selector={"app": "back"}, labels={USE: "waypoint", OF: "ways"}),
    service("ways", "canary", [served(80)], selector={"app": "back"}, labels={USE: "waypoint", "istio.io/use-waypoint-canary": "for-all"}, annotations={"istio.io/use-waypoint-canary-weight": "20"}),
]

APP = {"selector": {"matchLabels": {"app": "web"}}}


def authorization(name, spec, namespace="authorize", **more):
    return security("AuthorizationPolicy", namespace, name, spec, **more)


def source(**fields):
    return {"rules": [{"from": [{"source": fields}]}]}


def operation(**fields):
    return {"rules": [{"to": [{"operation": fields}]}]}


def when(key, **values):
    return {"rules": [{"when": [{"key": key, **values}]}]}


DENY = {"action": "DENY"}
AUTHORIZE = [
    pod("authorize", "web", ["10.5.0.1"], labels={"app": "web"}),
    pod("authorize", "web-of-v2", ["10.5.0.2"], labels={"app": "web", "version": "v2"}),
    pod("authorize", "db", ["10.5.0.3"], labels={"app": "db"}),
    pod("elsewhere", "web", ["10.5.0.4"], labels={"app": "web"}),
    # Scopes and actions.
    authorization("nothing", {}),
    authorization("nothing-denied", {**DENY}),
    authorization("empty-rule", {"rules": [{}]}),
    authorization("empty-rule-denied", {**DENY, "rules": [{}]}),
    authorization("selected", {**APP, **source(principals=["cluster.local/ns/a/sa/b"])}),
    authorization("selected-twice", {"selector": {"matchLabels": {"app": "web", "version": "v2"}}, **source(namespaces=["a"])}),
    authorization("empty-selector", {"selector": {}, **source(namespaces=["a"])}),
    authorization("empty-labels", {"selector": {"matchLabels": {}}, **source(namespaces=["a"])}),
    authorization("global", source(namespaces=["a"]), "istio-system"),
    authorization("selected-everywhere", {**APP, **source(namespaces=["a"])}, "istio-system"),
    authorization("audit", {"action": "AUDIT", **source(namespaces=["a"])}),
    authorization("dry-run", source(namespaces=["a"]), annotations={"istio.io/dry-run": "true"}),
    authorization("dry-run-false", source(namespaces=["a"]), annotations={"istio.io/dry-run": "false"}),
    authorization("of-another-revision", source(namespaces=["a"]), labels={"istio.io/rev": "other"}),
    authorization("of-a-service", {"targetRefs": [{"kind": "Service", "group": "", "name": "web"}], **source(namespaces=["a"])}),
    authorization("of-a-gateway", {"targetRefs": [{"kind": "Gateway", "group": "gateway.networking.k8s.io", "name": "waypoint"}], **source(namespaces=["a"])}),
    # Sources.
    authorization("principals", source(principals=["*", "cluster.local/ns/a/sa/b", "cluster.local/ns/a/*", "*/sa/b", "spiffe://cluster.local/ns/a/sa/c"], notPrincipals=["cluster.local/ns/a/sa/d"])),
    authorization("namespaces", source(namespaces=["a", "b*", "*c", "*"], notNamespaces=["d"])),
    authorization("accounts", source(serviceAccounts=["a/b", "other"], notServiceAccounts=["a/c"])),
    authorization("blocks", source(ipBlocks=["192.0.2.1", "198.51.100.0/24", "198.51.100.7/24", "2001:db8::/32", "2001:db8::1"], notIpBlocks=["203.0.113.0/24"])),
    authorization("several-sources", {"rules": [{"from": [{"source": {"namespaces": ["a"]}}, {"source": {"namespaces": ["b"], "ipBlocks": ["192.0.2.0/24"]}}]}]}),
    authorization("l7-sources", source(requestPrincipals=["*"])),
    authorization("l7-sources-denied", {**DENY, **source(notRequestPrincipals=["*"])}),
    authorization("mixed-source", source(namespaces=["a"], requestPrincipals=["*"])),
    authorization("mixed-source-denied", {**DENY, **source(namespaces=["a"], requestPrincipals=["*"])}),
    authorization("remote-blocks", source(remoteIpBlocks=["192.0.2.0/24"])),
    authorization("remote-blocks-denied", {**DENY, **source(namespaces=["a"], notRemoteIpBlocks=["192.0.2.0/24"])}),
    # Operations.
    authorization("ports", operation(ports=["80", "443"], notPorts=["8080"])),
    authorization("methods", operation(methods=["GET"])),
    authorization("methods-denied", {**DENY, **operation(methods=["GET"])}),
    authorization("mixed-operation", operation(ports=["80"], methods=["GET"])),
    authorization("mixed-operation-denied", {**DENY, **operation(ports=["80"], paths=["/admin*"])}),
    authorization("hosts-denied", {**DENY, **operation(hosts=["a.example.com"], notPorts=["80"])}),
    authorization("several-operations", {"rules": [{"to": [{"operation": {"ports": ["80"]}}, {"operation": {"ports": ["81"], "notPorts": ["82"]}}]}]}),
    authorization("l4-and-l7-operations-denied", {**DENY, "rules": [{"to": [{"operation": {"ports": ["80"]}}, {"operation": {"methods": ["GET"]}}]}]}),
    # Conditions.
    authorization("when-source-ip", when("source.ip", values=["192.0.2.0/24"], notValues=["192.0.2.1"])),
    authorization("when-namespace", when("source.namespace", values=["a"], notValues=["b"])),
    authorization("when-principal", when("source.principal", values=["*/sa/b"], notValues=["cluster.local/ns/a/sa/c"])),
    authorization("when-account", when("source.serviceAccount", values=["a/b"])),
    authorization("when-destination", when("destination.ip", values=["10.5.0.0/16"], notValues=["10.5.0.9"])),
    authorization("when-port", when("destination.port", values=["80", "90"], notValues=["91"])),
    authorization("when-header", when("request.headers[x-test]", values=["a"])),
    authorization("when-header-denied", {**DENY, **when("request.headers[x-test]", values=["a"])}),
    authorization("when-sni-denied", {**DENY, **when("connection.sni", values=["a.example.com"])}),
    authorization("when-remote-ip-denied", {**DENY, **when("remote.ip", values=["192.0.2.0/24"])}),
    authorization("when-claims", when("request.auth.claims[group]", values=["a"])),
    authorization("several-conditions", {"rules": [{"when": [{"key": "source.namespace", "values": ["a"]}, {"key": "destination.port", "values": ["80"]}]}]}),
    # Everything at once, and several rules.
    authorization("everything", {"rules": [{"from": [{"source": {"namespaces": ["a"]}}], "to": [{"operation": {"ports": ["80"]}}], "when": [{"key": "source.ip", "values": ["192.0.2.0/24"]}]}]}),
    authorization("several-rules", {"rules": [{"from": [{"source": {"namespaces": ["a"]}}]}, {"to": [{"operation": {"ports": ["80"]}}]}]}),
    authorization("one-rule-of-l7", {"rules": [{"from": [{"source": {"namespaces": ["a"]}}]}, {"to": [{"operation": {"methods": ["GET"]}}]}]}),
    authorization("one-rule-of-l7-denied", {**DENY, "rules": [{"from": [{"source": {"namespaces": ["a"]}}]}, {"to": [{"operation": {"methods": ["GET"]}}]}]}),
    authorization("l7-and-l4-in-one-rule-denied", {**DENY, "rules": [{"from": [{"source": {"namespaces": ["a"]}}], "to": [{"operation": {"methods": ["GET"]}}]}]}),
    # What admission does not let in, and a cluster without istiod's webhook does.
    authorization("bad-block", source(ipBlocks=["192.0.2.0/24", "nonsense"])),
    authorization("only-bad-blocks", source(ipBlocks=["nonsense"])),
    authorization("only-bad-blocks-denied", {**DENY, **source(ipBlocks=["nonsense"])}),
    authorization("bad-ports", operation(ports=["80", "65536", "http"])),
    authorization("only-bad-ports", operation(ports=["http"])),
    authorization("bad-condition", when("source.nonsense", values=["a"])),
    authorization("empty-source", {"rules": [{"from": [{"source": {}}]}]}),
    authorization("empty-source-denied", {**DENY, "rules": [{"from": [{"source": {}}]}]}),
    authorization("empty-from", {"rules": [{"from": []}]}),
    authorization("empty-operation", {"rules": [{"to": [{"operation": {}}]}]}),
    authorization("empty-string", source(namespaces=["", "a"])),
]


def authentication(namespace, name, mode=None, labels=None, **ports):
    spec = {"mtls": {"mode": mode}} if mode else {}
    spec |= {"selector": {"matchLabels": labels}} if labels else {}
    spec |= {"portLevelMtls": {number.removeprefix("p"): {"mode": of} for number, of in ports.items()}} if ports else {}
    return security("PeerAuthentication", namespace, name, spec)


SHAPES = {
    "strict": ("STRICT", {}),
    "permissive": ("PERMISSIVE", {}),
    "disabled": ("DISABLE", {}),
    "unset": ("UNSET", {}),
    "none": (None, {}),
    "strict-but-one": ("STRICT", {"p8080": "PERMISSIVE"}),
    "strict-but-two": ("STRICT", {"p8080": "PERMISSIVE", "p9090": "DISABLE"}),
    "strict-and-strict": ("STRICT", {"p8080": "STRICT"}),
    "strict-and-unset": ("STRICT", {"p8080": "UNSET"}),
    "permissive-but-one": ("PERMISSIVE", {"p8080": "STRICT"}),
    "permissive-but-two": ("PERMISSIVE", {"p8080": "STRICT", "p9090": "STRICT"}),
    "permissive-and-permissive": ("PERMISSIVE", {"p8080": "PERMISSIVE"}),
    "disabled-but-one": ("DISABLE", {"p8080": "STRICT"}),
    "unset-strict-port": ("UNSET", {"p8080": "STRICT"}),
    "unset-permissive-port": ("UNSET", {"p8080": "PERMISSIVE"}),
    "unset-disabled-port": ("UNSET", {"p8080": "DISABLE"}),
    "unset-mixed-ports": ("UNSET", {"p8080": "PERMISSIVE", "p9090": "STRICT"}),
    "none-strict-port": (None, {"p8080": "STRICT"}),
    "none-permissive-port": (None, {"p8080": "PERMISSIVE"}),
}


def shapes(namespace, third):
    for at, (name, (mode, ports)) in enumerate(SHAPES.items()):
        yield pod(namespace, name, [f"10.6.{third}.{at + 1}"], labels={"app": name})
        yield authentication(namespace, name, mode, {"app": name}, **ports)
    yield pod(namespace, "of-none", [f"10.6.{third}.100"], labels={"app": "of-none"})


PEERS = [
    *shapes("peer-none", 1),
    *shapes("peer-strict", 2),
    authentication("peer-strict", "default", "STRICT"),
    *shapes("peer-unset", 3),
    authentication("peer-unset", "default", "UNSET"),
    # Two that apply at one level: the older one wins.
    authentication("peer-ports", "a-first", "STRICT"),
    pod("peer-ports", "any", ["10.6.4.1"], labels={"app": "any", "tier": "one"}),
    authentication("peer-ports", "first", "PERMISSIVE", {"app": "any"}),
    authentication("istio-system", "selected", "STRICT", {"app": "any"}),
]
LATER = [
    authentication("peer-ports", "a-later", "PERMISSIVE"),
    authentication("peer-ports", "a-later-one", "STRICT", {"tier": "one"}),
]

# What changes afterwards, one state after the other.
CHANGES = {
    "mesh-wide-strict": [authentication("istio-system", "default", "STRICT")],
    "mesh-wide-permissive": [authentication("istio-system", "default", "PERMISSIVE")],
    "pods-change": [
        pod("fields", "captured", ["10.1.0.1"], annotations={}),
        pod("fields", "outside", ["10.1.0.3"]),
        pod("fields", "not-ready", ["10.1.0.9"]),
        pod("fields", "starting", ["10.1.0.11"]),
        pod("fields", "without-address", ["10.1.0.20"]),
        pod("fields", "dual", ["10.1.0.15", "fd00::15"], phase="Succeeded", ready=False),
        pod("services", "back-of-other-ports", ["10.2.0.2"], labels={"app": "moved"}, ports=[port(9090, "web")]),
        node("n4", {"topology.kubernetes.io/region": "r4", "topology.kubernetes.io/zone": "z4b"}),
        namespace("close"),
        service("services", "numbered", [served(80, 9090, "a")], selector={"app": "moved"}),
        {"gone": "Pod", "metadata": meta("services", "back")},
        {"gone": "Service", "metadata": meta("services", "named")},
        {"gone": "AuthorizationPolicy", "metadata": meta("authorize", "selected")},
        {"gone": "PeerAuthentication", "metadata": meta("peer-strict", "default")},
        {"gone": "EndpointSlice", "metadata": meta("slices", "to-pods-1")},
        {"gone": "Gateway", "metadata": meta("ways", "for-all")},
    ],
    "without-peer-authentication": [{"gone": "PeerAuthentication", "metadata": {}}],
}

FIRST = FIELDS + SERVICES + SLICES + WAYS + AUTHORIZE + PEERS
