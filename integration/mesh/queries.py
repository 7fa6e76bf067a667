"""Queries of Consul's UI and HashiCorp's Grafana dashboards to Prometheus, by the names and labels of Envoy under Consul."""

import dataclasses
import re

# Consul's UI, topology view. Each figure is a rate over 15 minutes: `{window}`. A test of a young series has other windows, or none.
SERVICE = {"labels": 'consul_source_service="{service}",consul_source_datacenter="dc1",consul_source_namespace="default"', "by": ""}
UPSTREAMS = {**SERVICE, "by": "by (consul_upstream_service,consul_upstream_datacenter,consul_upstream_namespace)"}
DOWNSTREAMS = {"labels": 'consul_destination_service="{service}",consul_destination_datacenter="dc1",consul_destination_namespace="default"',
               "by": "by (consul_source_service,consul_source_datacenter,consul_source_namespace)"}
# What is selected beside the service: at the listener of its own, at those of its upstreams, at the clusters of those who call it.
L7 = ('envoy_http_conn_manager_prefix="public_listener"', 'envoy_http_conn_manager_prefix="upstream"', "")
L4 = ('envoy_tcp_prefix="public_listener"', 'envoy_tcp_prefix=~"upstream.*"', "")


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of the UI: of listeners, and of clusters where those who call the service are asked."""
    name: str
    of_listeners: str
    of_clusters: str
    layer: tuple
    # The expression around the sum; {all} is the sum without a class.
    form: str = "{sum}"
    of_class: str = ""
    by: str = ""

    def query(self, place, service, change="rate({series}[15m])"):
        """`place` is 0 for the service itself, 1 for its upstreams, 2 for those who call it; `change` is what is made of each series."""
        where = (SERVICE, UPSTREAMS, DOWNSTREAMS)[place]
        labels = ",".join(part for part in (where["labels"].format(service=service), self.layer[place]) if part)
        by = where["by"].replace(")", f",{self.by})") if where["by"] and self.by else where["by"] or (f"by ({self.by})" if self.by else "")
        name = self.of_clusters if place == 2 else self.of_listeners

        def sum_of(labels):
            return f"sum({change.format(series=f'{name}{{{labels}}}')}) {by}"
        return self.form.format(sum=sum_of(f"{labels},{self.of_class}" if self.of_class else labels), all=sum_of(labels))


FIGURES = [
    Figure("RPS", "envoy_http_downstream_rq_completed", "envoy_cluster_upstream_rq_completed", L7),
    Figure("ER", "envoy_http_downstream_rq_xx", "envoy_cluster_upstream_rq_xx", L7, "{sum} / {all}", 'envoy_response_code_class="5"'),
    Figure("P50", "envoy_http_downstream_rq_time_bucket", "envoy_cluster_upstream_rq_time_bucket", L7, "histogram_quantile(0.5, {sum})", by="le"),
    Figure("P99", "envoy_http_downstream_rq_time_bucket", "envoy_cluster_upstream_rq_time_bucket", L7, "histogram_quantile(0.99, {sum})", by="le"),
    Figure("CR", "envoy_tcp_downstream_cx_total", "envoy_cluster_upstream_cx_total", L4),
    Figure("RX", "envoy_tcp_downstream_cx_rx_bytes_total", "envoy_cluster_upstream_cx_rx_bytes_total", L4, "8 * {sum}"),
    Figure("TX", "envoy_tcp_downstream_cx_tx_bytes_total", "envoy_cluster_upstream_cx_tx_bytes_total", L4, "8 * {sum}"),
    Figure("NR", "envoy_tcp_downstream_cx_no_route", "envoy_cluster_upstream_cx_connect_fail", L4),
]

# The graph of the UI; $service is the service's name.
GRAPHS = {
    "L7, errors": 'sum(irate(envoy_listener_http_downstream_rq_xx{consul_source_service="$service",$public,envoy_response_code_class="5"}[10m]))',
    "L7, others": 'sum(irate(envoy_listener_http_downstream_rq_xx{consul_source_service="$service",$public,envoy_response_code_class=~"[^5]"}[10m]))',
    "L4, in": 'sum(irate(envoy_tcp_downstream_cx_rx_bytes_total{consul_source_service="$service",envoy_tcp_prefix="public_listener"}[10m]))',
    "L4, out": 'sum(irate(envoy_tcp_downstream_cx_tx_bytes_total{consul_source_service="$service",envoy_tcp_prefix="public_listener"}[10m]))',
}

# HashiCorp's boards: service (S), service to service (P), dataplane (D). Those of containers and of Loki are other exporters' affair.
# $app, $source, $to and $cluster are the lists that "All" stands for.
TCP = ("rx_bytes_total", "tx_bytes_total", "rx_bytes_buffered", "tx_bytes_buffered", "total")
BOARDS = {
    "S: running services": 'sum(envoy_server_live{app!="traffic-generator"})',
    "S: success rate": 'sum(irate(envoy_cluster_upstream_rq_xx{envoy_response_code_class!~"4|5",consul_destination_service=~"$to"}[10m]))'
                       ' / sum(irate(envoy_cluster_upstream_rq_xx{consul_destination_service=~"$to"}[10m]))',
    "S: failed rate": 'sum(irate(envoy_cluster_upstream_rq_xx{envoy_response_code_class=~"4|5",consul_destination_service=~"$to"}[10m])) by (local_cluster)',
    "S: failed requests": 'sum(increase(envoy_cluster_upstream_rq_xx{envoy_response_code_class=~"4|5",consul_destination_service=~"$to"}[10m])) by (local_cluster)',
    "S: response time": 'sum(rate(envoy_cluster_upstream_rq_time_sum{consul_destination_service=~"$to"}[10m]))'
                        ' / sum(rate(envoy_cluster_upstream_rq_total{consul_destination_service=~"$to"}[10m]))',
    **{f"S: dataplane latency, {q}": f'histogram_quantile({q}, sum(rate(envoy_cluster_upstream_rq_time_bucket{{kubernetes_namespace=~"default",'
       'local_cluster=~"$app"}[10m])) by (le))' for q in (0.5, 0.75, 0.9, 0.99, 0.999)},
    **{f"S: TCP {name}": f'sum(rate(envoy_tcp_downstream_cx_{name}{{local_cluster=~"$app"}}[10m])) by (local_cluster)' for name in TCP},
    "S: active connections to upstreams": 'sum(envoy_cluster_upstream_cx_active{app=~"$app"}) by (app)',
    "S: active connections": 'sum(envoy_http_downstream_cx_active{app=~"$app"}) by (app)',
    "S: requests to upstreams by code": 'sum(rate(envoy_cluster_upstream_rq_xx{consul_destination_service=~"$to"}[10m])) by (namespace, app, envoy_response_code_class)',
    "S: requests by code": 'sum(rate(envoy_http_downstream_rq_xx{$public}[10m])) by (namespace, app, envoy_response_code_class)',
    "S: connections rejected by load": 'rate(envoy_listener_downstream_cx_overload_reject[10m])',
    "S: connections rejected by limit": 'rate(envoy_listener_downstream_global_cx_overflow[10m])',
    **{f"P: TCP {name}": f'sum(rate(envoy_tcp_downstream_cx_{name}[10m])) by (service, destination_service)' for name in TCP},
    "P: requests sent": 'sum(rate(envoy_cluster_upstream_rq_total{$pair,consul_destination_datacenter="dc1"}[10m])) by (local_cluster, consul_destination_service)',
    "P: timeliness": 'histogram_quantile(0.95, sum(rate(envoy_cluster_upstream_rq_time_bucket{$pair,consul_destination_target!=""}[10m])) by (le, consul_destination_target))',
    "P: duration": 'histogram_quantile(0.95, sum(rate(envoy_cluster_upstream_rq_time_bucket{$pair}[10m])) by (le, local_cluster, consul_destination_service))',
    "P: success": 'sum(irate(envoy_cluster_upstream_rq_xx{envoy_response_code_class!="5",$pair}[10m])) / sum(irate(envoy_cluster_upstream_rq_xx{$pair}[10m]))',
    "P: responses by code": 'sum(increase(envoy_http_downstream_rq_xx{$public,local_cluster=~"$to"}[10m])) by (envoy_response_code_class)',
    "P: responses": 'sum(increase(envoy_http_downstream_rq_total{$public,local_cluster=~"$to"}[10m]))',
    **{f"D: {name}": f'sum(envoy_server_{name}{{app=~"$app"}}) by (app)' for name in ("live", "memory_heap_size", "memory_allocated", "uptime")},
    "D: requests": 'sum(rate(envoy_http_downstream_rq_total{$public}[10m])) by (service)',
    "D: active connections by cluster": 'sum(envoy_cluster_upstream_cx_active{app=~"$app",envoy_cluster_name=~"$cluster"}) by (app, envoy_cluster_name)',
    "D: unhealthy clusters": 'sum(envoy_cluster_membership_healthy{app=~"$app",envoy_cluster_name=~"$cluster"})'
                             ' - sum(envoy_cluster_membership_total{app=~"$app",envoy_cluster_name=~"$cluster"})',
    "D: cluster state": 'sum(envoy_cluster_membership_healthy{app=~"$app",envoy_cluster_name=~"$cluster"})'
                        ' == bool sum(envoy_cluster_membership_total{app=~"$app",envoy_cluster_name=~"$cluster"})',
}
# Variables of the dashboards: the values of a label.
VARIABLES = {
    "app": ("envoy_server_live", "app"), "source": ("envoy_server_live", "consul_source_service"),
    "to": ("envoy_cluster_upstream_rq_total", "consul_destination_service"), "cluster": ("envoy_cluster_upstream_cx_total", "envoy_cluster_name"),
}


def filled(query, **values):
    """The query with its `$names` replaced, as Grafana does before it asks."""
    values |= {"pair": 'local_cluster=~"{source}",consul_destination_service=~"{to}"'.format(**{"source": "", "to": "", **values}), "public": L7[0]}
    return re.sub(r"\$(\w+)", lambda found: values[found[1]], query)


# Complaints of promtool's linter about Envoy's names, which dashboards need.
KNOWN_LINTS = (
    r"envoy_\w+ no help text",
    r'envoy_\w+ counter metrics should have "_total" suffix',
    r"envoy_\w+_ms metric names should not contain abbreviated units",
    r'envoy_cluster_membership_total non-counter metrics should not have "_total" suffix',
    r'envoy_server_days_until_first_cert_expiring use base unit "seconds" instead of "days"',
)
