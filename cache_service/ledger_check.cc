#include "cache_service/ledger_check.h"

#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"

namespace clusterkv::cache_service {
namespace {

// All blocks that sequences own, each once: forks share.
class Owners {
 public:
  explicit Owners(SequenceStore& store) {
    for (const auto& sequence : store.All()) {
      reserved_ += sequence->reserved_pages();
      Sequence::Holdings held = sequence->holdings();
      for (auto& part : held.parts) {
        if (!seen_.insert(part.get()).second) continue;
        pages_ += static_cast<int64_t>(part->block().pages().size());
        parts_.push_back(std::move(part));
      }
      for (auto& rows : held.rows) {
        if (!seen_.insert(rows.get()).second) continue;
        pages_ += rows->page_count();
        rows_.push_back(std::move(rows));
      }
    }
  }
  int64_t pages() const { return pages_; }
  int64_t reserved() const { return reserved_; }

  // Calls check(block) for every block whose contents are final.
  template <typename F>
  void ForEachSealed(F&& check) const {
    const auto visit = [&](const PageBlock& block) {
      const PageState state = block.state();
      if (state == PageState::kReady || state == PageState::kRecalling) check(block);
    };
    for (const auto& part : parts_) visit(part->block());
    for (const auto& rows : rows_) {
      // Only sinks are sealed; the blocks of other rows may still grow in number.
      if (rows->use() != MemoryUse::kParts) continue;
      for (const PageBlock& block : rows->blocks()) visit(block);
    }
  }

 private:
  absl::flat_hash_set<const void*> seen_;
  std::vector<std::shared_ptr<const IndexPart>> parts_;
  std::vector<std::shared_ptr<const PagedRows>> rows_;
  int64_t pages_ = 0, reserved_ = 0;
};

}  // namespace

void LedgerToProto(const PageLedger& ledger, v1::Ledger* proto) {
  proto->set_total(static_cast<uint64_t>(ledger.total));
  proto->set_free(static_cast<uint64_t>(ledger.free));
  proto->set_filling(static_cast<uint64_t>(ledger.filling));
  proto->set_ready(static_cast<uint64_t>(ledger.ready));
  proto->set_recalling(static_cast<uint64_t>(ledger.recalling));
  proto->set_quarantined(static_cast<uint64_t>(ledger.quarantined));
}

v1::VerifyLedgerResponse CheckLedger(const Arena& arena, SequenceStore& store,
                                     const std::function<std::optional<uint64_t>()>& quiet_mark,
                                     bool checksums) {
  v1::VerifyLedgerResponse response;
  PageLedger counted;
  std::vector<std::string> problems = arena.Audit(&counted);
  const std::optional<uint64_t> mark = quiet_mark();
  const int64_t changes = arena.changes();
  const PageLedger recorded = arena.ledger();
  const Owners owners(store);
  const int64_t held = recorded.total - recorded.free - recorded.quarantined;
  // A page in use that no sequence owns is a leak, if nothing moved while this counted.
  if (mark.has_value() && arena.changes() == changes && quiet_mark() == mark) {
    if (owners.pages() != held) {
      problems.push_back(
          absl::StrCat("pages in use: sequences own ", owners.pages(), ", the ledger has ", held));
    }
    if (owners.reserved() != recorded.reserved) {
      problems.push_back(absl::StrCat("pages reserved: sequences were promised ", owners.reserved(),
                                      ", the ledger has ", recorded.reserved));
    }
  }
  if (checksums) {
    uint64_t checked = 0;
    owners.ForEachSealed([&](const PageBlock& block) {
      for (int64_t i = 0; i < static_cast<int64_t>(block.pages().size()); ++i) {
        const absl::Status status = block.VerifyPage(i);
        if (!status.ok()) problems.push_back(std::string(status.message()));
        ++checked;
      }
    });
    response.set_pages_checked(checked);
  }
  LedgerToProto(counted, response.mutable_counted());
  LedgerToProto(recorded, response.mutable_recorded());
  for (std::string& problem : problems) response.add_problems(std::move(problem));
  response.set_balanced(response.problems().empty());
  return response;
}

}  // namespace clusterkv::cache_service
