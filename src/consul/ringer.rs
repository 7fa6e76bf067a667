//! Keeps the alarms that are worth their connections, and begins the sweeps.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::alarm::{Alarms, Bell};
use super::endpoint::Class;
use super::pace::random;
use super::query::{Asker, Event, Watch};

/// What rings together is swept together, and not by all sidecars of a host at the same instant.
const GATHER: Duration = Duration::from_millis(100);

/// Sets alarms where and while they are worth it, as long as somebody has the `asker`, which watches ask through.
pub async fn keep(alarms: Arc<Alarms>, asker: Weak<Asker>) {
    let mut set: HashMap<Class, Set> = HashMap::new();
    loop {
        alarms.to_be_reviewed().await;
        let wanted = alarms.wanted();
        set.retain(|class, _| wanted.contains_key(class));
        for (class, bell) in wanted {
            if set.contains_key(&class) {
                continue;
            }
            let Some(asker) = asker.upgrade() else { return };
            let ringing = ring(class.clone(), bell, alarms.clone(), asker);
            set.insert(class, Set { task: tokio::spawn(ringing) });
        }
    }
}

/// Alarms that are set, or about to be.
struct Set {
    task: JoinHandle<()>,
}

impl Drop for Set {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn ring(class: Class, bell: Arc<Bell>, alarms: Arc<Alarms>, asker: Arc<Asker>) {
    let queries = class.alarms();
    let (sender, mut events) = mpsc::channel(queries.len());
    let mut ringer = Ringer { class, bell, armed: vec![false; queries.len()], due: None, told: false };
    let _asking: Vec<Watch> = queries
        .into_iter()
        .enumerate()
        .map(|(number, query)| asker.watch(query, sender.clone(), move |event| (number, event)))
        .collect();
    loop {
        let due = ringer.due;
        tokio::select! {
            Some((number, event)) = events.recv() => ringer.heard(number, event),
            () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                match alarms.afford(ringer.bell.members()) {
                    Ok(()) => ringer.sweep(),
                    Err(later) => ringer.due = Some(later),
                }
            }
        }
    }
}

/// The alarms of a class, which are unset with it.
struct Ringer {
    class: Class,
    bell: Arc<Bell>,
    /// By alarm: whether it has an index that it blocks on.
    armed: Vec<bool>,
    /// When a sweep begins.
    due: Option<Instant>,
    /// Whether it is logged that the alarms cannot be set.
    told: bool,
}

impl Ringer {
    fn heard(&mut self, number: usize, event: Event<Option<u64>>) {
        self.armed[number] = match &event {
            Event::Value(answer) => answer.value.is_some(),
            Event::Failed(_) => false,
        };
        if !self.armed[number] {
            self.unset();
            self.tell(&event);
        } else if self.armed.iter().all(|armed| *armed) {
            // The first time, nobody rests yet, and the sooner the fewer answers come too early to rest on.
            let gather = if self.bell.has_rung() { GATHER.mul_f64(random()) } else { Duration::ZERO };
            self.due.get_or_insert(Instant::now() + gather);
        }
    }

    fn sweep(&mut self) {
        self.due = None;
        self.told = false;
        self.bell.ring();
    }

    fn unset(&mut self) {
        self.due = None;
        self.bell.unset();
    }

    fn tell(&mut self, event: &Event<Option<u64>>) {
        if std::mem::replace(&mut self.told, true) {
            return;
        }
        let class = &self.class;
        match event {
            Event::Failed(error) => tracing::info!("Changes of {class} are looked for in turns: {error}"),
            Event::Value(_) => {
                tracing::info!("Changes of {class} are looked for in turns: answers are stale or filtered")
            }
        }
    }
}

impl Drop for Ringer {
    fn drop(&mut self) {
        self.unset();
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::alarm::{MOST_QUERIES, PATROL_BOUNDS, Rest};
    use super::*;
    use crate::consul::slots::{Kind, LONG_WAIT, Slots};
    use crate::consul::watches::Watches;
    use crate::consul::{Client, Instances, Query, Settings};
    use crate::testing::{Agent, Fault};

    const SERVICES: usize = 300;
    const CHECKS: &str = "/v1/health/state/any";
    const ALARMS: [&str; 4] = [CHECKS, "/v1/catalog/services", "/v1/catalog/nodes", "/v1/config/terminating-gateway"];

    fn path(number: usize) -> String {
        format!("/v1/health/connect/s{number}")
    }

    /// Watches of the instances of many services.
    struct Many {
        agent: Agent,
        events: mpsc::Receiver<(usize, Option<usize>)>,
        all: Vec<Watch>,
        watches: Watches,
    }

    impl Many {
        async fn of(agent: Agent, settings: &Settings, services: usize) -> Self {
            for number in 0..services {
                agent.set(&path(number), json!([{}]));
            }
            let watches = Watches::new(Client::new(settings).expect("the settings are good"));
            let (sender, events) = mpsc::channel(16);
            let all = (0..services)
                .map(|number| {
                    let instances = Instances { service: format!("s{number}"), ..Instances::default() };
                    watches.watch(Query::health_connect(&instances), sender.clone(), move |event| match event {
                        Event::Value(answer) => (number, Some(answer.value.len())),
                        Event::Failed(_) => (number, None),
                    })
                })
                .collect();
            let mut many = Self { agent, events, all, watches };
            for _ in 0..services {
                assert_eq!(many.value().await.1, 1);
            }
            many
        }

        async fn start(services: usize) -> Self {
            let agent = agent_with_alarms().await;
            let settings = agent.settings();
            Self::of(agent, &settings, services).await
        }

        /// The next value, whatever failures come before it.
        async fn value(&mut self) -> (usize, usize) {
            loop {
                let event = tokio::time::timeout(LONG_WAIT * 20, self.events.recv()).await.expect("an event in time");
                if let (number, Some(instances)) = event.expect("running watches") {
                    return (number, instances);
                }
            }
        }

        /// Another number of instances of one service, and how long it took to be seen.
        async fn change(&mut self, number: usize, instances: usize, rings: Option<&str>) -> Duration {
            let start = Instant::now();
            self.agent.set(&path(number), json!(vec![json!({}); instances]));
            if let Some(alarm) = rings {
                self.agent.touch(alarm);
            }
            assert_eq!(self.value().await, (number, instances));
            start.elapsed()
        }

        /// Lets the watches come to rest.
        async fn settle(&self) {
            tokio::time::sleep(Duration::from_secs(40)).await;
        }

        fn resting(&self) -> bool {
            let alarms = self.watches.alarms().expect("alarms are on");
            alarms.any_set()
        }
    }

    async fn agent_with_alarms() -> Agent {
        let agent = Agent::start().await;
        for alarm in ALARMS {
            agent.set(alarm, json!([]));
        }
        agent
    }

    #[tokio::test(start_paused = true)]
    async fn what_rings_is_seen_at_once_and_silence_costs_little() {
        let mut many = Many::start(SERVICES).await;
        many.settle().await;
        let before = many.agent.count(|_| true);
        tokio::time::sleep(Duration::from_secs(600)).await;
        // Four alarms a minute, and each watch once in seven to ten; taking turns would ask 12 000 times.
        let asked = many.agent.count(|_| true) - before;
        assert!((300..700).contains(&asked), "{asked} requests");
        for (number, alarm) in ALARMS.into_iter().enumerate() {
            let took = many.change(100 + number, 2, Some(alarm)).await;
            assert!(took < Duration::from_secs(1), "{alarm}: {took:?}");
            many.settle().await;
        }
        let most = many.agent.most_connections();
        assert!(most <= 32, "{most} connections");
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_that_rings_nothing_is_found_by_the_patrol() {
        let mut many = Many::start(SERVICES).await;
        many.settle().await;
        let took = many.change(7, 2, None).await;
        assert!(took > Duration::from_secs(1) && took <= PATROL_BOUNDS.1, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn alarms_that_ring_all_the_time_cost_no_more_than_turns() {
        let mut many = Many::start(SERVICES).await;
        many.settle().await;
        let before = many.agent.count(|_| true);
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(300) {
            many.agent.touch(CHECKS);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let asked = many.agent.count(|_| true) - before;
        let most = 300 * MOST_QUERIES as usize + 5 * SERVICES + 300;
        assert!((most / 2..=most).contains(&asked), "{asked} requests");
        // A sweep of all, and what is left of the one before it.
        let took = many.change(7, 2, Some(CHECKS)).await;
        assert!(took < Duration::from_secs(20), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn without_one_of_its_alarms_a_class_takes_turns() {
        for missing in ALARMS {
            let agent = agent_with_alarms().await;
            agent.remove(missing);
            let settings = agent.settings();
            let mut many = Many::of(agent, &settings, SERVICES).await;
            many.settle().await;
            assert!(!many.resting());
            let took = many.change(7, 2, None).await;
            assert!(took < Duration::from_secs(25), "{missing}: {took:?}");
            // And as soon as it is back, it rings.
            many.agent.set(missing, json!([]));
            many.settle().await;
            assert!(many.resting());
            let took = many.change(8, 2, Some(missing)).await;
            assert!(took < Duration::from_secs(1), "{missing}: {took:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_that_was_away_is_asked_for_everything() {
        let mut many = Many::start(SERVICES).await;
        many.settle().await;
        many.agent.fault(Some(Fault::Status(500, "No cluster leader")));
        many.agent.disconnect();
        tokio::time::sleep(Duration::from_secs(5)).await;
        // Its indexes are as they were, as those of another agent can be by chance.
        many.agent.set(&path(7), json!([]));
        many.agent.fault(None);
        let start = Instant::now();
        assert_eq!(many.value().await, (7, 0));
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
        many.settle().await;
        assert!(many.resting());
    }

    #[tokio::test(start_paused = true)]
    async fn indexes_that_go_backwards_ring() {
        let mut many = Many::start(SERVICES).await;
        many.settle().await;
        many.agent.go_backwards();
        let start = Instant::now();
        many.agent.set(&path(7), json!([]));
        assert_eq!(many.value().await, (7, 0));
        // A query with an index of the future ends with its wait.
        assert!(start.elapsed() < LONG_WAIT * 2, "{:?}", start.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn those_that_have_a_connection_each_set_no_alarms() {
        let mut many = Many::start(20).await;
        many.settle().await;
        assert!(many.change(7, 2, None).await < Duration::from_millis(100));
        assert_eq!(many.agent.requests(CHECKS).len(), 0);
        many.all.truncate(5);
    }

    #[tokio::test(start_paused = true)]
    async fn alarms_end_with_the_crowd() {
        let mut many = Many::start(SERVICES).await;
        many.settle().await;
        assert!(many.resting());
        many.all.truncate(10);
        many.settle().await;
        assert!(!many.resting());
        assert!(many.change(7, 2, None).await < Duration::from_millis(100));
        drop(many.all);
        drop(many.watches);
        let gone = async {
            while many.agent.open_connections() > 0 {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(300), gone).await.expect("nothing is left that asks");
    }

    #[tokio::test(start_paused = true)]
    async fn stale_answers_and_other_namespaces_have_no_alarms() {
        for (stale, namespace) in [(true, None), (false, Some("team".to_string()))] {
            let agent = agent_with_alarms().await;
            let settings = Settings { stale, namespace, ..agent.settings() };
            let mut many = Many::of(agent, &settings, 100).await;
            many.settle().await;
            assert_eq!(many.agent.requests(CHECKS).len(), 0);
            assert!(many.change(7, 2, None).await < Duration::from_secs(25));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_rested_on_only_if_the_alarms_were_set_before_it_was_asked_for() {
        let slots = Slots::new(8);
        let alarms = Alarms::new(slots.clone());
        let member = slots.join(Kind::Turn);
        let mut rest = alarms.join(&Class::Chains);
        let bell = alarms.bell(&Class::Chains);
        let mut ringer = Ringer { class: Class::Chains, bell, armed: vec![false; 2], due: None, told: false };
        let index = || Event::Value(crate::consul::Answer { value: Some(7), filtered_by_acls: false });
        let rests = async |rest: &mut Rest| {
            let second = tokio::time::timeout(Duration::from_secs(1), rest.until_alarm(&member)).await;
            second.is_err()
        };

        // Asked for before the alarms were set, answered after: asked for once more, without blocking.
        rest.asks();
        ringer.heard(0, index());
        assert!(ringer.due.is_none(), "one of two alarms is not enough");
        ringer.heard(1, index());
        ringer.sweep();
        rest.answered(true);
        assert!(rest.until_alarm(&member).await.is_some());
        rest.asks();
        rest.answered(true);
        assert!(rests(&mut rest).await);

        // An alarm between the request and its answer.
        rest.asks();
        ringer.heard(0, index());
        ringer.sweep();
        rest.answered(true);
        assert!(rest.until_alarm(&member).await.is_some());

        // The alarms were away in between.
        rest.asks();
        rest.answered(true);
        ringer.heard(1, Event::Value(crate::consul::Answer { value: None, filtered_by_acls: true }));
        assert!(rest.until_alarm(&member).await.is_none(), "without alarms it takes turns");
        ringer.heard(1, index());
        ringer.sweep();
        assert!(rest.until_alarm(&member).await.is_some());

        // An answer that the alarms do not cover.
        rest.asks();
        rest.answered(false);
        assert!(rest.until_alarm(&member).await.is_none());
        assert_eq!(slots.load().turns, 1);
        drop((rest, member));
        assert_eq!(slots.load().turns, 0);
    }
}
