//! The bytes of HTTP/2: frames (RFC 9113 section 4) and header fields (RFC 7541). Pure; input may be anything.

pub mod fields;
pub mod frame;
pub mod hpack;
mod huffman;
pub mod reader;
