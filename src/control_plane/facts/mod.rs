//! Turns Kubernetes objects into mesh facts. Pure.
//!
//! ```text
//!   the API's JSON ──► api ──► read ──► object ──► index ──► workload, service ──► resource
//! ```
//! `api` takes from the JSON only the fields that are needed, `read` checks them and makes small objects, `index` keeps
//! these and knows which facts depend on which objects. A change touches only the facts that depend on it, and whatever
//! the order of changes, the facts are those of a list from scratch.
//!
//! The facts are those that istiod derives from the same objects. What differs, and why, is said where it differs.

pub mod api;
pub mod index;
mod label_index;
pub mod object;
mod owner;
pub mod read;
pub mod resource;
mod selector;
mod service;
mod space;
mod waypoint;
mod workload;

pub use index::Index;
pub use read::Reader;

#[cfg(test)]
mod tests;
