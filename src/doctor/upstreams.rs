//! Checks of an upstream: its discovery chain and its instances.

use super::check::{Findings, check_answer};
use crate::consul::{Chain, Client, Instances, Query, api};

pub(super) async fn examine(client: &Client, upstream: &api::Upstream, findings: &mut Findings) {
    let name = &upstream.destination_name;
    let given = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
    if upstream.destination_type == "prepared_query" {
        let query = Query::prepared_query(name, given(&upstream.datacenter).as_deref());
        let title = format!("prepared query {name}");
        let result = client.fetch(&query).await;
        if let Some(result) =
            check_answer(&title, result, findings, |result| format!("{} instances", result.nodes.len()))
            && result.nodes.is_empty()
        {
            findings.fail(
                title,
                "it finds no instance",
                "check the query (GET /v1/query) and that the token may read the services it finds",
            );
        }
        return;
    }
    if !upstream.destination_peer.is_empty() {
        findings.warn(
            format!("upstream {name}"),
            "it is of a cluster peering, which is not supported",
            "use another upstream",
        );
        return;
    }
    let chain = Chain {
        service: name.clone(),
        datacenter: given(&upstream.datacenter),
        namespace: given(&upstream.destination_namespace),
        partition: given(&upstream.destination_partition),
        ..Chain::default()
    };
    let answer = client.fetch(&Query::discovery_chain(&chain)).await;
    let title = format!("discovery chain of {name}");
    let chain = check_answer(title, answer, findings, |chain| {
        format!("{}, leads to {} targets", chain.protocol, chain.targets.len())
    });
    if let Some(chain) = chain {
        instances(client, name, &chain, findings).await;
    }
}

/// Instances of a target.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Seen {
    Passing(usize),
    /// So many are registered.
    NonePassing(usize),
    NoneRegistered,
    /// Rows were left out that the token may not see.
    Hidden,
}

async fn instances(client: &Client, name: &str, chain: &api::CompiledDiscoveryChain, findings: &mut Findings) {
    let title = format!("endpoints of {name}");
    let mut targets = Vec::new();
    for target in chain.targets.values() {
        let query = instances_of(target, chain);
        match client.fetch(&Query::health_connect(&query)).await {
            Ok(answer) => targets.push((target.id.as_str(), seen(&answer.value, answer.filtered_by_acls))),
            answer => {
                check_answer(format!("endpoints of {}", target.id), answer, findings, |_| String::new());
            }
        }
    }
    report(&title, &targets, findings);
}

fn instances_of(target: &api::ChainTarget, chain: &api::CompiledDiscoveryChain) -> Instances {
    let other = |name: &String, own: &String| {
        Some(name.clone()).filter(|name| !name.is_empty() && name != own && name != "default")
    };
    Instances {
        service: target.service.clone(),
        datacenter: other(&target.datacenter, &chain.datacenter),
        namespace: other(&target.namespace, &String::new()),
        partition: other(&target.partition, &String::new()),
        filter: Some(target.subset.filter.clone()).filter(|filter| !filter.is_empty()),
        ..Instances::default()
    }
}

fn seen(rows: &[api::CheckServiceNode], filtered: bool) -> Seen {
    let is_usable = |row: &&api::CheckServiceNode| {
        row.checks.iter().all(|check| matches!(check.status.as_str(), "passing" | "warning"))
    };
    match rows.iter().filter(is_usable).count() {
        0 if filtered => Seen::Hidden,
        0 if rows.is_empty() => Seen::NoneRegistered,
        0 => Seen::NonePassing(rows.len()),
        passing => Seen::Passing(passing),
    }
}

fn report(title: &str, targets: &[(&str, Seen)], findings: &mut Findings) {
    let words = |seen: &Seen| match seen {
        Seen::Passing(count) => format!("{count} usable"),
        Seen::NonePassing(count) => format!("none of {count} registered instances is passing its checks"),
        Seen::NoneRegistered => "no instance is registered".to_owned(),
        Seen::Hidden => "instances are hidden from the token".to_owned(),
    };
    let found: Vec<String> = targets.iter().map(|(id, seen)| format!("{id}: {}", words(seen))).collect();
    let found = found.join("; ");
    let is_usable = |(_, seen): &(&str, Seen)| matches!(seen, Seen::Passing(_));
    let next = match targets.iter().map(|(_, seen)| seen).find(|seen| !matches!(seen, Seen::Passing(_))) {
        _ if targets.is_empty() => return,
        None => return findings.ok(title, found),
        Some(Seen::Hidden) => "give the token service:read on the service and node:read on its nodes",
        Some(Seen::NonePassing(_)) => "see the checks of its instances and of their sidecars in Consul",
        Some(_) => {
            "register an instance with a sidecar, or give the token service:read on the service and node:read on its nodes: \
             agents before 1.11 do not tell the difference"
        }
    };
    if targets.iter().any(is_usable) { findings.warn(title, found, next) } else { findings.fail(title, found, next) }
}

#[cfg(test)]
mod tests {
    use super::super::check::Level;
    use super::*;

    #[test]
    fn an_upstream_is_well_when_all_of_its_targets_are_and_bad_when_none_is() {
        let level = |targets: &[Seen]| {
            let targets: Vec<_> = targets.iter().map(|seen| ("db", seen.clone())).collect();
            let mut findings = Findings::default();
            report("endpoints of db", &targets, &mut findings);
            findings.checks.pop().map(|check| (check.level, check.next.is_some()))
        };
        let passing = Seen::Passing(2);
        assert_eq!(level(std::slice::from_ref(&passing)), Some((Level::Ok, false)));
        assert_eq!(level(&[passing, Seen::NoneRegistered]), Some((Level::Warn, true)));
        for seen in [Seen::NonePassing(1), Seen::NoneRegistered, Seen::Hidden] {
            assert_eq!(level(&[seen]), Some((Level::Fail, true)));
        }
        assert_eq!(level(&[]), None);
    }
}
