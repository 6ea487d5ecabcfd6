"""What the publishers of other tools say of the files that they take, as far as a deployment writes them.

Facts in a notation of our own, read from the sources that each entry names (all Apache-2.0, Grafana's
AGPL-3.0): a mapping is an object that has these fields and no others, ``!`` behind a name says that it must
be there; a list holds values of its one element; a tuple is a choice; ``str``, ``int``, ``bool``, ``number``,
``strings`` (an object of strings) and ``any`` are what they say. Pods inside are left to Kubernetes' own
schemas (``pod``).
"""

from __future__ import annotations

from typing import Any

_NODE = {"name!": "str", "labels": "strings", "annotations": "strings", "namespace": "str"}
_ENV = [{"name!": "str", "value": "str", "valueFrom": {"secretKeyRef": {"name": "str", "key!": "str"}}}]

#: leaderworkerset.x-k8s.io/v1, release 0.10 (config/crd/bases of kubernetes-sigs/lws).
LEADER_WORKER_SET = {
    "apiVersion!": ("leaderworkerset.x-k8s.io/v1",),
    "kind!": ("LeaderWorkerSet",),
    "metadata!": _NODE,
    "spec!": {
        "replicas": "int",
        "startupPolicy": ("LeaderCreated", "LeaderReady"),
        "leaderWorkerTemplate!": {
            "size": "int",
            "restartPolicy": ("RecreateGroupOnPodRestart", "None", "Default"),
            "leaderTemplate": "pod",
            "workerTemplate!": "pod",
        },
    },
}

#: serving.kserve.io/v1alpha1, release 0.20 (config/crd/full/llmisvc of kserve/kserve). Its containers need a
#: name alone, because they are merged with those of a template.
LLM_INFERENCE_SERVICE = {
    "apiVersion!": ("serving.kserve.io/v1alpha1", "serving.kserve.io/v1alpha2"),
    "kind!": ("LLMInferenceService",),
    "metadata!": _NODE,
    "spec!": {
        "model!": {"uri!": "str", "name": "str"},
        "replicas": "int",
        "parallelism": {"tensor": "int", "pipeline": "int", "data": "int", "expert": "bool"},
        "router": {"route": {}, "gateway": {}, "scheduler": {}},
        "template": "pod",
    },
}

#: monitoring.coreos.com/v1, release 0.80 (example/prometheus-operator-crd of prometheus-operator).
POD_MONITOR = {
    "apiVersion!": ("monitoring.coreos.com/v1",),
    "kind!": ("PodMonitor",),
    "metadata!": _NODE,
    "spec!": {
        "selector!": {"matchLabels": "strings"},
        "podMetricsEndpoints": [{"port": "str", "path": "str", "interval": "str", "scheme": "str"}],
    },
}
_RULES = {
    "groups!": [
        {
            "name!": "str",
            "interval": "str",
            "rules": [
                {
                    "alert": "str",
                    "expr!": "str",
                    "for": "str",
                    "labels": "strings",
                    "annotations": "strings",
                }
            ],
        }
    ]
}
PROMETHEUS_RULE = {
    "apiVersion!": ("monitoring.coreos.com/v1",),
    "kind!": ("PrometheusRule",),
    "metadata!": _NODE,
    "spec!": _RULES,
}
#: Prometheus 2 and 3, configuration/alerting_rules of its documentation: what promtool checks.
RULE_FILE = _RULES

_PROBE = {"failureThreshold": "int", "periodSeconds": "int", "initialDelaySeconds": "int"}
#: Chart vllm-stack 0.1.12 (helm/values.schema.json and helm/templates of vllm-project/production-stack). The
#: chart gives its contexts, volumes and tolerations to Kubernetes as they are.
PRODUCTION_STACK = {
    "servingEngineSpec!": {
        "runtimeClassName": "str",
        "strategy": {"type": ("Recreate", "RollingUpdate")},
        "startupProbe": _PROBE,
        "containerSecurityContext": "any",
        "vllmApiKey": {"secretName!": "str", "secretKey!": "str"},
        "modelSpec!": [
            {
                "name!": "str",
                "repository!": "str",
                "tag!": "str",
                "modelURL!": "str",
                "replicaCount": "int",
                "requestCPU!": "int",
                "requestMemory!": "str",
                "requestGPU": "int",
                "requestGPUType": "str",
                "shmSize": "str",
                "vllmConfig": {
                    "enablePrefixCaching": "bool",
                    "tensorParallelSize": "int",
                    "extraArgs": ["str"],
                },
                "extraVolumes": ["any"],
                "extraVolumeMounts": ["any"],
                "env": _ENV,
                "tolerations": ["any"],
                "nodeSelectorTerms": [
                    {"matchExpressions": [{"key!": "str", "operator!": ("In", "Gt"), "values": ["str"]}]}
                ],
            }
        ],
    }
}

#: Ray 2.60 (ServeDeploySchema of ray/serve/schema.py; LLMConfig of ray/llm).
RAY_SERVE = {
    "http_options": {"host": "str", "port": "int"},
    "applications!": [
        {
            "name": "str",
            "route_prefix": "str",
            "import_path!": "str",
            "args": {
                "llm_configs!": [
                    {
                        "model_loading_config!": {"model_id!": "str", "model_source": "str"},
                        "engine_kwargs": "any",
                        "deployment_config": {
                            "autoscaling_config": {"min_replicas": "int", "max_replicas": "int"}
                        },
                        "runtime_env": {"env_vars": "strings"},
                    }
                ]
            },
        }
    ],
}

#: KubeRay 1.4 (ray-operator/apis/ray/v1: RayServiceSpec, RayClusterSpec, HeadGroupSpec, WorkerGroupSpec).
RAY_SERVICE = {
    "apiVersion!": ("ray.io/v1",),
    "kind!": ("RayService",),
    "metadata!": _NODE,
    "spec!": {
        "serveConfigV2": "str",
        "rayClusterConfig": {
            "rayVersion": "str",
            "headGroupSpec!": {"rayStartParams": "strings", "template!": "pod"},
            "workerGroupSpecs": [
                {
                    "groupName!": "str",
                    "replicas": "int",
                    "minReplicas!": "int",
                    "maxReplicas!": "int",
                    "rayStartParams": "strings",
                    "template!": "pod",
                }
            ],
        },
    },
}

_SOURCE = {"type": "str", "uid": "str"}
#: Grafana's dashboard model, schemaVersion 36 on (kinds/dashboard of grafana/grafana).
DASHBOARD = {
    "uid": "str",
    "title": "str",
    "tags": ["str"],
    "timezone": "str",
    "schemaVersion!": "int",
    "version": "int",
    "editable": "bool",
    "refresh": "str",
    "time": {"from": "str", "to": "str"},
    "templating": {
        "list": [{"name!": "str", "label": "str", "type!": ("datasource", "query"), "query": "str"}]
    },
    "panels": [
        {
            "id": "int",
            "type!": "str",
            "title": "str",
            "datasource": _SOURCE,
            "gridPos": {"h!": "int", "w!": "int", "x!": "int", "y!": "int"},
            "fieldConfig": {"defaults!": {"unit": "str", "min": "number"}, "overrides!": ["any"]},
            "options": "any",
            "targets": [{"refId": "str", "datasource": _SOURCE, "expr": "str", "legendFormat": "str"}],
        }
    ],
}

#: The Compose Specification (schema/compose-spec.json of compose-spec/compose-spec, 2025).
COMPOSE = {
    "services!": "services",
}
_SERVICE = {
    "image": "str",
    "command": ["str"],
    "environment": "strings",
    "volumes": [{"type!": ("bind",), "source": "str", "target": "str", "read_only": "bool"}],
    "ports": ["str"],
    "ipc": "str",
    "restart": ("no", "always", "on-failure", "unless-stopped"),
    "stop_grace_period": "str",
    "healthcheck": {
        "test": ["str"],
        "interval": "str",
        "timeout": "str",
        "retries": "int",
        "start_period": "str",
    },
    "devices": ["str"],
    "group_add": ["str"],
    "cap_add": ["str"],
    "security_opt": ["str"],
    "deploy": {
        "resources": {
            "reservations": {
                "devices": [{"driver": "str", "count": "int", "capabilities!": ["str"]}],
            }
        }
    },
}

_TYPES = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "bool": {"type": "boolean"},
    "number": {"type": "number"},
    "any": {},
    "pod": {"type": "object"},
    "strings": {"type": "object", "additionalProperties": {"type": "string"}},
}


def schema(facts: Any) -> dict[str, Any]:
    """JSON Schema of facts in the notation above."""
    if facts == "services":
        return {"type": "object", "additionalProperties": schema(_SERVICE), "minProperties": 1}
    if isinstance(facts, str):
        return _TYPES[facts]
    if isinstance(facts, tuple):
        return {"enum": list(facts)}
    if isinstance(facts, list):
        return {"type": "array", "items": schema(facts[0])}
    return {
        "type": "object",
        "properties": {name.rstrip("!"): schema(value) for name, value in facts.items()},
        "required": [name[:-1] for name in facts if name.endswith("!")],
        "additionalProperties": False,
    }
