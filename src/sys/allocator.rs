//! Settings of jemalloc, the allocator of the program.

/// Settings that jemalloc reads when the process starts. It finds them by the name of this symbol.
///
/// One arena for each processor instead of four: of each, pages that are partly used stay. Memory that is not used any
/// more is returned after a second instead of ten: opening connections needs more than open ones do.
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static SETTINGS: &[u8; 53] = b"narenas_ratio:1,dirty_decay_ms:1000,muzzy_decay_ms:0\0";
