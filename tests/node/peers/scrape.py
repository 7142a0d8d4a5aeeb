"""Scrapes the metrics port with several Accept headers and reads each answer with Prometheus' own Python parsers.

Prints one JSON object: for each header the content type and the type of each family, by the name its samples have."""
import json, sys, urllib.request
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as text

answers = {}
for accept in sys.argv[1:]:
    request = urllib.request.Request("http://127.0.0.1:15020/metrics", headers={"Accept": accept} if accept != "-" else {})
    with urllib.request.urlopen(request, timeout=10) as answer:
        kind, body = answer.headers["Content-Type"], answer.read().decode()
    families = (open_metrics if kind.startswith("application/openmetrics-text") else text)(body)
    types = {}
    for family in families:
        for sample in family.samples:
            assert types.setdefault(sample.name, family.type) == family.type, sample
        if not family.samples:
            types[family.name] = family.type
    answers[accept] = {"content_type": kind, "types": types}
print(json.dumps(answers))
