//! Headers of netlink messages (source: netlink(7)).

/// Length of a header.
pub const HEADER: usize = 16;
/// `NLM_F_REQUEST`.
pub const REQUEST: u16 = 1;
/// `NLMSG_ERROR`.
pub const ERROR: u16 = 2;

/// Length and type of the first message in `bytes`. `None` if there is none or it is damaged.
pub fn header(bytes: &[u8]) -> Option<(usize, u16)> {
    let length = bytes.get(..4)?.try_into().ok().map(u32::from_ne_bytes)?;
    let kind = bytes.get(4..6)?.try_into().ok().map(u16::from_ne_bytes)?;
    let length = usize::try_from(length).ok()?;
    (length >= HEADER).then_some((length, kind))
}

/// The error number in an answer of type [`ERROR`]. 0 means success.
pub fn error(answer: &[u8]) -> Option<i32> {
    let code = answer.get(HEADER..HEADER + 4)?.try_into().ok().map(i32::from_ne_bytes)?;
    code.checked_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_that_is_cut_or_has_length_0_ends_the_reading() {
        assert_eq!(header(&[]), None);
        assert_eq!(header(&[0; 16]), None, "a length of 0 would never end");
        let mut message = vec![0; 20];
        message[..4].copy_from_slice(&20u32.to_ne_bytes());
        message[4..6].copy_from_slice(&33u16.to_ne_bytes());
        assert_eq!(header(&message), Some((20, 33)));
        assert_eq!(header(&message[..5]), None);
    }
}
