"""Watching a served model: Prometheus alerts and a Grafana dashboard over the series that vLLM exports, with
the limits of this deployment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from quant.serving.artefacts.base import Placement, head, kube_name, one_line, to_yaml
from quant.serving.deployment import Deployment
from quant.vllm import metrics

#: Limits of alerts: seconds to the first token (P95) and per output token (P95), share of the KV cache, share
#: of requests answered by a server error.
_TTFT, _TPOT, _CACHE, _ERRORS = 2.0, 0.2, 0.95, 0.01


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


_HTTP_ERRORS = (
    'sum(rate(http_requests_total{status=~"5.*"}[5m])) / clamp_min(sum(rate(http_requests_total[5m])), 1e-9)'
)


def _cache_in_use(deployment: Deployment) -> str:
    return f"max({_series(deployment, metrics.GAUGES['kv_cache_usage'])})"


def _rules(deployment: Deployment) -> list[dict[str, Any]]:
    waiting = f"sum({_series(deployment, metrics.GAUGES['queue'])})"
    running = f"sum({_series(deployment, metrics.GAUGES['running'])})"
    rows: Sequence[tuple[str, str, str, str, str]] = (
        ("VllmDown", f"absent({_series(deployment, metrics.GAUGES['running'])})", "2m", "critical",
         "no series of the model: the server is down, restarting or not scraped"),
        ("VllmSlowFirstToken", f"{_quantile(deployment, 0.95, metrics.HISTOGRAMS['ttft'])} > {_TTFT:g}",
         "5m", "warning", f"TTFT P95 above {_TTFT:g} s: prompts wait; add replicas or shorten prompts"),
        ("VllmSlowTokens",
         f"{_quantile(deployment, 0.95, metrics.HISTOGRAMS['tpot'])} > {_TPOT:g}",
         "5m", "warning", f"P95 of the time per output token above {_TPOT:g} s: the batch is too large"),
        ("VllmQueueGrows", f"{waiting} > {running}", "5m", "warning",
         "more requests wait than run: demand is above what the server can"),
        ("VllmCacheFull", f"{_cache_in_use(deployment)} > {_CACHE:g}", "5m", "warning",
         f"KV cache above {_CACHE:.0%}: requests will be preempted; lower max-model-len or use an FP8 cache"),
        ("VllmPreempts", f"{_per_second(deployment, metrics.COUNTERS['preemptions'])} > 0", "10m", "warning",
         "requests are preempted and computed again: the KV cache is too small for the load"),
        ("VllmErrors", f"{_HTTP_ERRORS} > {_ERRORS:g}", "5m", "critical",
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


def _groups(deployment: Deployment) -> dict[str, Any]:
    return {"groups": [{"name": kube_name(deployment.name), "rules": _rules(deployment)}]}


def alerts(deployment: Deployment, placement: Placement) -> str:
    """A file of Prometheus rules."""
    return head(deployment, "A rule_files entry of prometheus.yml; promtool check rules FILE.") + to_yaml(
        _groups(deployment)
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
        ("Server errors", "percentunit", [("", _HTTP_ERRORS)]),
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
        "uid": kube_name(deployment.name)[:40],
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
    name = kube_name(deployment.name)
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
            "spec": _groups(deployment),
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": f"{name}-dashboard", "labels": {**labels, "grafana_dashboard": "1"}},
            "data": {f"{name}.json": dashboard(deployment, placement)},
        },
    ]
    return head(
        deployment, "Apply it with: kubectl apply -f FILE (the Prometheus operator must be there)"
    ) + ("---\n".join(map(to_yaml, objects)))
