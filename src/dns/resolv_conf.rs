//! Reads name servers and search domains from a `resolv.conf`. Pure.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};

/// How many name servers are used, as in the C library (`MAXNS`).
const SERVERS_MAX: usize = 3;
/// How many search domains are used; Kubernetes allows 32.
const SEARCH_MAX: usize = 32;
/// Longest domain name.
const NAME_MAX: usize = 253;
/// Port of name servers.
const PORT: u16 = 53;

/// Name servers and search domains.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResolvConf {
    /// Name servers, in the order of the file.
    pub servers: Vec<SocketAddr>,
    /// Search domains, in lower case, without leading or trailing dots.
    pub search: Vec<String>,
}

impl ResolvConf {
    /// Reads a file. Invalid parts are skipped, as the C library does (source: resolv.conf(5)).
    pub fn parse(text: &str) -> Self {
        let mut read = Self::default();
        for line in text.lines() {
            // A comment starts at the beginning of a line or after a blank.
            let line = if line.starts_with(['#', ';']) { "" } else { line };
            let mut words = line.split_whitespace().take_while(|word| !word.starts_with(['#', ';']));
            match words.next() {
                Some("nameserver") => {
                    let server = words.next().and_then(server).filter(|_| read.servers.len() < SERVERS_MAX);
                    read.servers.extend(server);
                }
                // The last `search` or `domain` line counts.
                Some("search") => {
                    read.search.clear();
                    for domain in words.filter_map(domain) {
                        if !read.search.contains(&domain) && read.search.len() < SEARCH_MAX {
                            read.search.push(domain);
                        }
                    }
                }
                Some("domain") => read.search = words.filter_map(domain).take(1).collect(),
                _ => {}
            }
        }
        read
    }

    /// Search domains of a pod under Kubernetes' default DNS policy.
    pub fn kubernetes_search(namespace: &str, cluster_domain: &str) -> Vec<String> {
        vec![format!("{namespace}.svc.{cluster_domain}"), format!("svc.{cluster_domain}"), cluster_domain.to_owned()]
    }
}

fn server(word: &str) -> Option<SocketAddr> {
    let (ip, scope) = word.split_once('%').map_or((word, None), |(ip, scope)| (ip, Some(scope)));
    match (ip.parse().ok()?, scope) {
        (IpAddr::V6(ip), Some(scope)) => Some(SocketAddrV6::new(ip, PORT, 0, scope.parse().ok()?).into()),
        (ip, _) => Some(SocketAddr::new(ip, PORT)),
    }
}

fn domain(word: &str) -> Option<String> {
    let bare = word.trim_matches('.').to_ascii_lowercase();
    (!bare.is_empty() && bare.len() <= NAME_MAX).then_some(bare)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_as_the_c_library_reads_it() {
        let read = ResolvConf::parse(
            "# written by kubelet\nsearch old.example\nnameserver 10.96.0.10 # cluster\n\tnameserver fd00::a\n\
             nameserver fe80::1%2\nnameserver 1.1.1.1\nnameserver nonsense\n;search no.example\n\
             search Shop.svc.Cluster.Local. svc.cluster.local . cluster.local\noptions ndots:5\nnonsense\n",
        );
        let servers: Vec<String> = read.servers.iter().map(ToString::to_string).collect();
        assert_eq!(servers, ["10.96.0.10:53", "[fd00::a]:53", "[fe80::1%2]:53"]);
        assert_eq!(read.search, ["shop.svc.cluster.local", "svc.cluster.local", "cluster.local"]);
        assert_eq!(ResolvConf::parse("search a.example\ndomain b.example c.example").search, ["b.example"]);
        assert_eq!(ResolvConf::parse(""), ResolvConf::default());
        let defaults = ResolvConf::kubernetes_search("shop", "corp.example");
        assert_eq!(defaults, ["shop.svc.corp.example", "svc.corp.example", "corp.example"]);
    }
}
