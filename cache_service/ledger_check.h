// Verification: every page recounted from its owners and compared with the arena's ledger.
#ifndef CLUSTERKV_CACHE_SERVICE_LEDGER_CHECK_H_
#define CLUSTERKV_CACHE_SERVICE_LEDGER_CHECK_H_

#include <cstdint>
#include <functional>
#include <optional>

#include "cache_service/arena.h"
#include "cache_service/sequence_store.h"
#include "clusterkv/v1/admin_service.pb.h"

namespace clusterkv::cache_service {

void LedgerToProto(const PageLedger& ledger, v1::Ledger* proto);

// Counts pages in blocks that are alive and, from the sequences, in blocks that somebody owns. With
// work under way the two may differ by what it holds: they are compared if quiet_mark() is the same
// before and after. With `checksums` every sealed page is read and compared.
v1::VerifyLedgerResponse CheckLedger(const Arena& arena, SequenceStore& store,
                                     const std::function<std::optional<uint64_t>()>& quiet_mark,
                                     bool checksums);

}  // namespace clusterkv::cache_service

#endif  // CLUSTERKV_CACHE_SERVICE_LEDGER_CHECK_H_
