"""Watching a served model: Prometheus alerts and a Grafana dashboard over the series that vLLM exports, with
the limits of this deployment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quant.serving.artefacts.base import Placement, head, kube_name, one_line, to_yaml
from quant.serving.deployment import Deployment
from quant.vllm import metrics

if TYPE_CHECKING:
    from quant.serving.check.profile import Profile

#: Limits of alerts where the profile has none: seconds to the first token (P95) and per output token (P95).
_TTFT, _TPOT = 2.0, 0.2
#: Share of the KV cache, and of requests answered by a server error.
_CACHE, _ERRORS = 0.95, 0.01


def _series(deployment: Deployment, name: str, **labels: str) -> str:
    """A selector of this model's series."""
    chosen = {"model_name": deployment.name, **labels}
    inner = ",".join(f"{k}={json.dumps(v)}" for k, v in chosen.items())
    return f"{metrics.PREFIX}{name}{{{inner}}}"


def _quantile(deployment: Deployment, share: float, histogram: str) -> str:
    rate = f"rate({_series(deployment, histogram + '_bucket')}[5m])"
    return f"histogram_quantile({share:g}, sum by (le) ({rate}))"


def _per_second(deployment: Deployment, counter: str) -> str:
    return f"sum(rate({_series(deployment, counter)}[5m]))"


def _errors(deployment: Deployment) -> str:
    """Share of the API's requests that end in a server error. The series has no model, so those of its
    servers are taken: a Prometheus watches others too."""
    own = f"and on (job, instance) {_series(deployment, metrics.GAUGES['running'])}"

    def rate(**labels: str) -> str:
        inner = ",".join(f"{k}=~{json.dumps(v)}" for k, v in {"handler": "/v1/.*", **labels}.items())
        return f"sum(rate(http_requests_total{{{inner}}}[5m]) {own})"

    return f"{rate(status='5.*')} / clamp_min({rate()}, 1e-9)"


def _cache_in_use(deployment: Deployment) -> str:
    return f"max({_series(deployment, metrics.GAUGES['kv_cache_usage'])})"


def _slow(deployment: Deployment, profile: Profile) -> list[tuple[str, str, str, str, str]]:
    """The rows of :func:`_rules` whose limits are a profile's."""
    limits = profile.performance
    first = limits.ttft_p95_ms / 1e3 if limits.ttft_p95_ms else _TTFT
    rows = [(0.95, first), *([(0.99, limits.ttft_p99_ms / 1e3)] if limits.ttft_p99_ms else [])]
    alerts = []
    for share, most in rows:
        alert = "VllmSlowFirstToken" + ("" if share == 0.95 else f"P{100 * share:g}")
        expression = f"{_quantile(deployment, share, metrics.HISTOGRAMS['ttft'])} > {most:g}"
        said = f"TTFT P{100 * share:g} above {most:g} s: prompts wait; add replicas or shorten prompts"
        alerts.append((alert, expression, "5m", "warning", said))
    stream = limits.stream_tokens_per_second
    most = round(1 / stream, 4) if stream else _TPOT
    per_token = f"{_quantile(deployment, 0.95, metrics.HISTOGRAMS['tpot'])} > {most:g}"
    said = f"P95 of the time per output token above {most:g} s: the batch is too large"
    alerts.append(("VllmSlowTokens", per_token, "5m", "warning", said))
    if limits.tokens_per_second:
        least = limits.tokens_per_second
        produced = _per_second(deployment, metrics.COUNTERS["output_tokens"])
        waiting = f"sum({_series(deployment, metrics.GAUGES['queue'])})"
        said = f"fewer than {least:g} tokens a second while requests wait"
        alerts.append(("VllmSlowBatch", f"{produced} < {least:g} and {waiting} > 0", "10m", "warning", said))
    return alerts


def _rules(deployment: Deployment, profile: Profile) -> list[dict[str, Any]]:
    waiting = f"sum({_series(deployment, metrics.GAUGES['queue'])})"
    running = f"sum({_series(deployment, metrics.GAUGES['running'])})"
    rows: Sequence[tuple[str, str, str, str, str]] = (
        ("VllmDown", f"absent({_series(deployment, metrics.GAUGES['running'])})", "2m", "critical",
         "no series of the model: the server is down, restarting or not scraped"),
        *_slow(deployment, profile),
        ("VllmQueueGrows", f"{waiting} > {running}", "5m", "warning",
         "more requests wait than run: demand is above what the server can"),
        ("VllmCacheFull", f"{_cache_in_use(deployment)} > {_CACHE:g}", "5m", "warning",
         f"KV cache above {_CACHE:.0%}: requests will be preempted; lower max-model-len or use an FP8 cache"),
        ("VllmPreempts", f"{_per_second(deployment, metrics.COUNTERS['preemptions'])} > 0", "10m", "warning",
         "requests are preempted and computed again: the KV cache is too small for the load"),
        ("VllmErrors", f"{_errors(deployment)} > {_ERRORS:g}", "5m", "critical",
         f"more than {_ERRORS:.0%} of requests end in a server error"),
    )  # fmt: skip
    return [
        {
            "alert": alert,
            "expr": expression,
            "for": duration,
            "labels": {"severity": severity, "model": deployment.name},
            "annotations": {"summary": f"{one_line(deployment.name)}: {summary}"},
        }
        for alert, expression, duration, severity, summary in rows
    ]


def _groups(deployment: Deployment, placement: Placement) -> dict[str, Any]:
    from quant.serving.check.profile import read_profile

    rules = _rules(deployment, read_profile(placement.profile))
    return {"groups": [{"name": kube_name(deployment), "rules": rules}]}


def alerts(deployment: Deployment, placement: Placement) -> str:
    """A file of Prometheus rules."""
    return head(deployment, "A rule_files entry of prometheus.yml; promtool check rules FILE.") + to_yaml(
        _groups(deployment, placement)
    )


def _panels(deployment: Deployment, price: float | None) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Title, unit of Grafana, and the lines (legend, expression) of each panel."""

    def quantiles(histogram: str) -> list[tuple[str, str]]:
        return [(f"P{100 * q:g}", _quantile(deployment, q, histogram)) for q in (0.5, 0.95, 0.99)]

    produced = _per_second(deployment, metrics.COUNTERS["output_tokens"])
    panels: list[tuple[str, str, list[tuple[str, str]]]] = [
        ("Time to first token", "s", quantiles(metrics.HISTOGRAMS["ttft"])),
        ("Time per output token", "s", quantiles(metrics.HISTOGRAMS["tpot"])),
        ("Whole answers", "s", quantiles(metrics.HISTOGRAMS["e2el"])),
        ("Tokens a second", "short",
         [("output", produced), ("prompt", _per_second(deployment, metrics.COUNTERS["prompt_tokens"]))]),
        ("Requests", "short",
         [("running", f"sum({_series(deployment, metrics.GAUGES['running'])})"),
          ("waiting", f"sum({_series(deployment, metrics.GAUGES['queue'])})")]),
        ("KV cache in use", "percentunit", [("", _cache_in_use(deployment))]),
        ("Preemptions a second", "short", [("", _per_second(deployment, metrics.COUNTERS["preemptions"]))]),
        ("Prefix cache hits", "percentunit",
         [("", f"{_per_second(deployment, metrics.COUNTERS['prefix_hits'])} / "
               f"clamp_min({_per_second(deployment, 'prefix_cache_queries_total')}, 1e-9)")]),
        ("Server errors", "percentunit", [("", _errors(deployment))]),
    ]  # fmt: skip
    if price is not None:
        cost = f"{price:g} / 3600 / clamp_min({produced}, 1e-9) * 1e6"
        panels.append((f"Cost of a million output tokens, at {price:g} an hour", "short", [("", cost)]))
    return panels


def _dashboard(deployment: Deployment, placement: Placement) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${source}"}
    panels = []
    for number, (title, unit, lines) in enumerate(_panels(deployment, placement.price)):
        panels.append(
            {
                "id": number + 1,
                "type": "timeseries",
                "title": title,
                "datasource": source,
                "gridPos": {"h": 8, "w": 12, "x": 12 * (number % 2), "y": 8 * (number // 2)},
                "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
                "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
                "targets": [
                    {"refId": chr(65 + i), "datasource": source, "expr": expression, "legendFormat": legend}
                    for i, (legend, expression) in enumerate(lines)
                ],
            }
        )
    return {
        "uid": kube_name(deployment)[:40],
        "title": f"vLLM: {one_line(deployment.name)}",
        "tags": ["vllm"],
        "timezone": "browser",
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {
            "list": [{"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}]
        },
        "panels": panels,
    }


def dashboard(deployment: Deployment, placement: Placement) -> str:
    """A Grafana dashboard (Dashboards, New, Import)."""
    return json.dumps(_dashboard(deployment, placement), indent=1) + "\n"


def monitoring(deployment: Deployment, placement: Placement) -> str:
    """Objects of a cluster with the Prometheus operator: what scrapes the pods, the rules, and the dashboard
    as Grafana's sidecar finds it."""
    name = kube_name(deployment)
    labels = {"app.kubernetes.io/name": name}
    objects: list[dict[str, Any]] = [
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PodMonitor",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "selector": {"matchLabels": labels},
                "podMetricsEndpoints": [{"port": "http", "path": "/metrics", "interval": "15s"}],
            },
        },
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": {"name": name, "labels": labels},
            "spec": _groups(deployment, placement),
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": f"{name}-dashboard", "labels": {**labels, "grafana_dashboard": "1"}},
            "data": {f"{name}.json": dashboard(deployment, placement)},
        },
    ]
    return head(
        deployment,
        "Apply it with: kubectl apply -f FILE (the Prometheus operator must be there)",
        "It watches the pods of --output kubernetes and leaderworkerset, by their label.",
    ) + ("---\n".join(map(to_yaml, objects)))
