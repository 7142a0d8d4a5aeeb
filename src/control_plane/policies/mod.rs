//! Converts AuthorizationPolicies and PeerAuthentications into policies of the mesh, and says in their statuses what of
//! them does not hold. Pure, apart from [`status::write`].
//!
//! The meaning is Istio's. Where istiod drops what a node cannot judge, and thereby admits more than was written, this
//! module refuses more instead:
//!
//! | case | istiod | here |
//! |---|---|---|
//! | DENY, a rule (or one of its alternatives) with HTTP tests only | never denies | denies whatever else the rule matches, or everything |
//! | a CIDR or port that cannot be read | dropped; a list that is emptied so tests nothing | ALLOW: never hits; DENY: always hits |
//! | a source, operation or condition that tests nothing, an empty `from`, `to` or `when` | never matches, or tests nothing | ALLOW: never matches; DENY: always |
//! | an empty value | as a namespace it matches peers without identity | like a value that cannot be read |
//! | a field that is not known | lost | like a test on HTTP |
//! | an object that cannot be read | ignored | every connection of its scope is refused (PeerAuthentication: STRICT) |
//! | a principal with `spiffe://` | never matches | is the principal without it |
//! | a range of IPv4-mapped addresses | never matches | is the IPv4 range |
//! | an AuthorizationPolicy with an empty selector | selects workloads one by one, and misses some | applies to its namespace, or the mesh |
//! | a workload without labels | every selector selects it | none does |
//! | annotation `istio.io/dry-run` | left out, unless istiod is told to send it | sent, evaluated and logged |
//! | PeerAuthentication without mode below STRICT, with DISABLE at a port | the port stays strict | the port is exempt, as PERMISSIVE |
//! | the same with a PeerAuthentication without mode between it and a STRICT mesh | everything is permissive | only the exempt ports are |
//! | `portLevelMtls` without selector | left out | a STRICT port makes the whole level STRICT |
//! | a PeerAuthentication that is STRICT with exempt ports, below a STRICT level | has one clause twice | has it once; the meaning is the same |
//! | a namespace with more than 4,096 policies, or 2 MiB of them, apart from the root namespace | all are served | every connection to its workloads is refused |
//! | a workload that more than 256 policies select | it lists all of them | every connection to it is refused |
//! | label `istio.io/rev` of another control plane | the object is ignored | the object counts |

mod authentication;
mod authorization;
mod index;
mod levels;
mod notes;
mod object;
mod rules;
mod selectors;
mod served;
mod shallow;
pub mod status;
mod touched;
mod values;

pub use index::{Index, LISTED_MAX};
pub use object::{Kind, Object, Written};
pub use served::{BYTES_MAX, COUNT_MAX};
pub use touched::Touched;

#[cfg(test)]
mod definitions;
